"use strict";
/* Ask the server for a newer report, and put it into the open page: its place, order and hidden curves stay. */
(() => {
  const PERIOD = 3000;
  const said = document.getElementById("live");
  let tag = said.dataset.tag;
  let shown = "";

  const headOf = (table, text) => [...table.querySelectorAll("th")].find((head) => head.textContent === text);

  /* What a reader has set in the page, as a function that sets it again. */
  const settings = () => {
    const tables = [...document.querySelectorAll("table[id]")].map((table) => {
      const sorted = table.querySelector("th[aria-sort]");
      return {
        id: table.id, left: table.parentElement.scrollLeft, isWhole: !table.classList.contains("cut"),
        column: sorted?.textContent, order: sorted?.getAttribute("aria-sort") === "descending" ? -1 : 1,
      };
    });
    const opened = [...document.querySelectorAll("details")].map((each) => each.open);
    const sections = () => [...document.querySelectorAll("section, article")];
    const top = (element) => element.getBoundingClientRect().top;
    const place = sections().findLastIndex((each) => top(each) <= 0);
    const offset = place < 0 ? 0 : top(sections()[place]);
    return () => {
      for (const { id, left, isWhole, column, order } of tables) {
        const table = document.getElementById(id);
        if (!table) continue;
        const more = document.querySelector(`button.more[data-table="${id}"]`);
        if (isWhole && more) report.expand(more);
        const head = column && headOf(table, column);
        if (head) report.sort(head, order);
        table.parentElement.scrollLeft = left;
      }
      document.querySelectorAll("details").forEach((each, index) => { each.open = opened[index] ?? false; });
      const section = sections()[place];
      if (section) window.scrollBy({ top: top(section) - offset, behavior: "instant" });
    };
  };

  /* A figure with the unit and the hidden curves of the one that is drawn now. */
  const likeDrawn = (plot, drawn) => {
    const data = plot.data.map((trace) => {
      const before = drawn.data.find((each) => each.name !== undefined && each.name === trace.name);
      return before?.visible === "legendonly" ? { ...trace, visible: "legendonly" } : { ...trace };
    });
    const layout = { ...plot.layout };
    const active = drawn.layout.updatemenus?.[0]?.active ?? 0;
    const menu = layout.updatemenus?.[0];
    if (menu && active) {
      const [{ x }, changes] = menu.buttons[active].args;
      data.forEach((trace, index) => { trace.x = x[index]; });
      layout.xaxis = { ...layout.xaxis, title: { text: changes["xaxis.title.text"] } };
      layout.updatemenus = [{ ...menu, active }];
    }
    return { data, layout };
  };

  const put = ({ html, plots }) => {
    const restore = settings();
    const drawn = new Map([...document.querySelectorAll("[data-plot][data-drawn=yes]")].map((e) => [e.dataset.plot, e]));
    const main = document.createElement("main");
    main.innerHTML = html;
    const kept = new Map();
    for (const element of main.querySelectorAll("[data-plot]")) {
      const before = drawn.get(element.dataset.plot);
      if (!before) continue;
      before.style.height = element.style.height;
      element.replaceWith(before);
      kept.set(before, likeDrawn(plots[before.dataset.plot], before));
    }
    document.querySelector("main").replaceWith(main);
    report.renew(plots, kept);
    restore();
  };

  const say = (text) => {
    if (text !== shown) said.textContent = shown = text;
  };

  let isOver = said.dataset.over === "yes";
  const ask = async () => {
    try {
      const answer = await fetch("update", { headers: { "If-None-Match": tag } });
      /* Somebody who marks text would lose the mark. */
      if (answer.status === 200 && getSelection().isCollapsed) {
        const update = await answer.json();
        put(update);
        tag = answer.headers.get("ETag");
        isOver = update.is_over;
        document.body.dataset.updates = String(Number(document.body.dataset.updates ?? 0) + 1);
        const at = new Date().toLocaleTimeString();
        say(isOver ? `The sweep has ended; last refreshed at ${at}.` : `Live: refreshed at ${at}.`);
      } else if (answer.status >= 500) {
        say("The records cannot be read at this moment; trying again.");
      }
    } catch {
      if (!isOver) say("The server does not answer: this is the last state that it has sent.");
    }
    setTimeout(ask, PERIOD); /* also after the end: the sweep may be extended */
  };
  setTimeout(ask, PERIOD);
})();
