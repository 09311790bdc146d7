#!/usr/bin/env bash
# Fetch the openly licensed emoji artwork that the embedded model is pretrained on (needs npm).
# Usage: bash scripts/fetch_artwork.sh [FOLDER]      (default .artwork)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.artwork}
mkdir -p "$folder/fluent" "$folder/noto"
cd "$folder"
echo "Fetching Fluent 3D emoji (MIT) and Noto emoji (Apache-2.0) into $folder"
tar xzf "$(npm pack --silent @lobehub/fluent-emoji-3d@1.1.0)" -C fluent --strip-components=1
tar xzf "$(npm pack --silent emoji-datasource-google@16.0.0)" -C noto --strip-components=1
rm -f ./*.tgz
