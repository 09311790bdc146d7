() => {
    // Gradio names its upload buttons by other words than they show, which confuses whoever speaks to a page.
    const named = () => document.querySelectorAll("button.upload-container[aria-label]").forEach(b => b.removeAttribute("aria-label"));
    new MutationObserver(named).observe(document.body, {childList: true, subtree: true});
    named();
}
