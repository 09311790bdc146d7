from setuptools import find_packages, setup

# Configurations, the embedded model and the demo concepts are installed from where they lie: see ldm/shipped.py.
SHIPPED = {"ldm._shipped.configs": "configs", "ldm._shipped.data": "data"}

setup(
    packages=[*find_packages(include=["ldm", "ldm.*", "dci", "dci.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"": ["templates/*", "static/*"], **{package: ["**/*"] for package in SHIPPED}},
    include_package_data=False,
)
