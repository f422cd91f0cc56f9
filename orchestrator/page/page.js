"use strict";
(() => {
  let plots = JSON.parse(document.getElementById("plots").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 640px)");
  const find = () => [...document.querySelectorAll("[data-plot]")];
  let elements = find();

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /* Colors of the page for everything in a figure that does not show data. */
  const template = () => {
    const axis = { gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line"),
                   title: { standoff: 12 }, automargin: true };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: color("--text"), family: getComputedStyle(document.body).fontFamily, size: 12 },
        xaxis: axis, yaxis: axis, hoverlabel: { align: "left" }, margin: { l: 60, r: 20, t: 30, b: 50 },
      },
      data: {
        parcoords: [{ type: "parcoords", labelfont: { color: color("--text") }, tickfont: { color: color("--text") },
                      rangefont: { color: color("--soft") } }],
      },
    };
  };

  const layoutOf = (plot) => {
    const layout = { ...plot.layout, template: template(), autosize: true };
    if (narrow.matches) layout.margin = { ...layout.margin, l: Math.min(layout.margin?.l ?? 50, 50), r: 12 };
    if (layout.updatemenus) {
      layout.updatemenus = layout.updatemenus.map((menu) => ({
        ...menu, bgcolor: color("--code"), bordercolor: color("--line"), font: { color: color("--text") },
      }));
    }
    return layout;
  };

  /* Without a pointer that hovers, the bar of buttons would always lie over the figure. */
  const hovers = window.matchMedia("(hover: hover)").matches && !narrow.matches;
  const config = { responsive: true, displaylogo: false, displayModeBar: hovers ? "hover" : false,
                   modeBarButtonsToRemove: ["lasso2d", "select2d"] };

  /* A figure is drawn when it comes near the window, so that a page with many of them opens at once. */
  const waiting = new Set(elements);
  const draw = (element) => {
    if (!waiting.delete(element)) return;
    near.unobserve(element);
    const plot = plots[element.dataset.plot];
    Plotly.newPlot(element, plot.data, layoutOf(plot), config).then(() => { element.dataset.drawn = "yes"; });
  };
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "300px" },
  );
  elements.forEach((element) => near.observe(element));

  /* Draw a figure that is drawn already with new data, or with new colors. */
  const redraw = (element, plot = plots[element.dataset.plot]) =>
    Plotly.react(element, plot.data, layoutOf(plot), config);
  window.addEventListener("beforeprint", () => elements.forEach(draw));

  dark.addEventListener("change", () => {
    elements.filter((each) => !waiting.has(each)).forEach((element) => redraw(element));
  });

  const sort = (head, order) => {
    const table = head.closest("table");
    const column = head.cellIndex;
    const isNumber = head.classList.contains("number");
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order === 1 ? "ascending" : "descending");
    const keyOf = (row) => row.cells[column].dataset.key;
    const compare = isNumber ? (a, b) => a - b : (a, b) => a.localeCompare(b, undefined, { numeric: true });
    const isEmpty = (row) => row.cells[column].textContent === "" || row.cells[column].textContent === "not compared";
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => isEmpty(a) - isEmpty(b) || order * compare(keyOf(a), keyOf(b)));
    table.tBodies[0].append(...rows);
  };

  const expand = (button) => {
    document.getElementById(button.dataset.table).classList.remove("cut");
    button.remove();
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.parentElement.tagName === "TH" && button.closest(".sortable")) {
      const head = button.parentElement;
      sort(head, head.getAttribute("aria-sort") === "ascending" ? -1 : 1);
    }
    if (button.classList.contains("more")) expand(button);
    if (button.classList.contains("copy")) {
      const code = button.previousElementSibling;
      const done = () => { button.textContent = "Copied"; };
      const select = () => { getSelection().selectAllChildren(code); };
      if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, select);
      else select();
    }
  });

  /* For live.js: take new figures. Those of `kept` (element -> figure) are drawn already and stay in their elements. */
  const renew = (newPlots, kept) => {
    plots = newPlots;
    elements = find();
    waiting.clear();
    near.disconnect();
    for (const element of elements) {
      if (kept.has(element)) redraw(element, kept.get(element));
      else { waiting.add(element); near.observe(element); }
    }
  };

  window.report = { expand, renew, sort };
  document.body.dataset.ready = "yes";
})();
