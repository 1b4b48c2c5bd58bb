// Code that is wider than the page is a stop of the Tab key, so that arrow keys scroll it.
const update = () => {
  for (const code of document.querySelectorAll(".highlight pre")) {
    if (code.scrollWidth > code.clientWidth) code.tabIndex = 0;
    else code.removeAttribute("tabindex");
  }
};
update();
addEventListener("load", update);
addEventListener("resize", update);
