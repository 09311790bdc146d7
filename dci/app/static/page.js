() => {
    document.documentElement.lang = "en";
}
