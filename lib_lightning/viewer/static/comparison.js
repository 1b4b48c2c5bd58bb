// The page of a comparison: a chosen feature, its counterpart in the other graph, their edges, and what is known of both.

for (const part of document.querySelectorAll("section")) {
  const graphs = part.querySelector(".graphs");
  const said = part.querySelector(".said");
  const choose = (dot) => {
    for (const element of graphs.querySelectorAll(".on")) element.classList.remove("on");
    graphs.classList.toggle("chosen", Boolean(dot));
    said.textContent = "";
    if (!dot) return;
    const filled = dot.hasAttribute("data-pair");
    const same = filled ? graphs.querySelectorAll(`[data-pair="${dot.dataset.pair}"]`) : [dot];
    for (const one of same) {
      one.classList.add("on");
      const line = document.createElement("div");
      line.textContent = one.closest("figure").querySelector("figcaption").textContent + ": " + one.textContent;
      said.append(line);
      const svg = one.closest("svg");
      for (const edge of svg.querySelectorAll("line")) {
        if (edge.dataset.ends.split(" ").includes(one.id)) edge.classList.add("on");
      }
    }
  };
  graphs.addEventListener("click", (event) => choose(event.target.closest("circle:not(.on)")));
  // The dots of a graph are one stop of the Tab key: arrow keys move among them.
  const moveFrom = (dot, distance) => {
    const dots = [...dot.closest("svg").querySelectorAll("circle")];
    dots[dots.indexOf(dot) + distance]?.focus();
  };
  graphs.addEventListener("focusin", ({target}) => {
    for (const dot of target.closest("svg").querySelectorAll("circle")) dot.setAttribute("tabindex", dot === target ? 0 : -1);
  });
  graphs.addEventListener("keydown", (event) => {
    const distance = {ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[event.key];
    if (distance) {
      event.preventDefault();
      moveFrom(event.target, distance);
    }
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(event.target.closest("circle:not(.on)"));
    }
    if (event.key === "Escape") choose(null);
  });
}
