// Whether the page is dark: as TensorBoard is set in its tab, and as the browser prefers elsewhere.

const PREFERRED = "(prefers-color-scheme: dark)";

/** Calls `changed(dark)` now and at every change; returns a function that ends this. */
export function watchDark(changed) {
  const board = boardBody();
  const preferred = matchMedia(PREFERRED);
  const update = () => changed(board ? board.classList.contains("dark-mode") : preferred.matches);
  const observer = new MutationObserver(update);
  if (board) observer.observe(board, {attributes: true, attributeFilter: ["class"]});
  else preferred.addEventListener("change", update);
  update();
  return () => {
    observer.disconnect();
    preferred.removeEventListener("change", update);
  };
}

/** The body of TensorBoard's page, of which the tab is a frame; null elsewhere, such as in a notebook. */
function boardBody() {
  try {
    const outer = window.parent === window ? null : window.parent.document;
    return outer?.querySelector("tb-webapp") ? outer.body : null;
  } catch {
    return null; // a page of another origin
  }
}
