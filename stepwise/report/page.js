"use strict";
// The colours of the page, and the tail browser: a list of which only the rows in sight are in the document.
// Text from a run enters the document through textContent alone, never as HTML.
(() => {
  const $ = (id) => document.getElementById(id);

  const themes = ["auto", "light", "dark"];
  $("theme").addEventListener("click", () => {
    const now = themes[(themes.indexOf($("theme").textContent) + 1) % themes.length];
    $("theme").textContent = now;
    if (now === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
  });

  const ROW = 118; // pixels of a row
  const SPARE = 4; // rows kept above and below those in sight
  const MOST = 600; // characters of a response in a row; all of them when it is open

  let sets, set; // all sets of prompts; the one shown
  let order = []; // the items that pass the filter, sorted
  let haystack = []; // per item: all its text in lower case
  let at = 0; // the selected place in `order`
  let falling = true;
  const drawn = new Map(); // place in `order` -> element

  const unpack = async () => {
    const text = atob($("data").textContent.trim());
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return (await new Response(stream).json()).sets;
  };

  const element = (tag, options = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "text") made.textContent = value;
      else if (value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  };

  const number = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const digits = size >= 100 || Number.isInteger(value) ? 0 : size >= 0.1 ? 2 : 3;
    return (size > 0 && size < 0.001 ? value.toExponential(1) : value.toFixed(digits)).replace("-", "−");
  };

  // Choices ------------------------------------------------------------------------------------------------------

  const choices = (id, pairs) => $(id).replaceChildren(...pairs.map(([value, text]) => element("option", { value, text })));
  const indexed = (kind) => set.scores.map((s, i) => [i, s.name, s.kind]).filter(([, , k]) => k === kind);

  const show = (index) => {
    set = sets[index];
    const costs = indexed("cost"), rewards = indexed("rewards");
    choices("measure", [...set.scores.map((s, i) => [i, s.name]), ["prompt", "place of the prompt"]]);
    choices("by", set.policies.map((p, i) => [i, p.label]));
    choices("minus", [["", "nothing"], ...set.policies.map((p, i) => [i, p.label])]);
    choices("stratum", [["", "every"], ...set.strata.map((name, i) => [i, name])]);
    choices("cost", costs);
    choices("reward", rewards);
    $("cost-label").hidden = costs.length < 2;
    $("reward-label").hidden = rewards.length < 2;
    $("set-label").hidden = sets.length < 2;
    $("policies").replaceChildren($("policies").firstElementChild, ...set.policies.map((policy, i) => {
      const box = element("input", { type: "checkbox", value: i });
      box.checked = policy.shown;
      return element("label", {}, box, element("i", { class: `swatch s${policy.colour}` }), policy.label);
    }));
    haystack = [];
    clear();
  };

  const clear = () => {
    for (const id of ["text", "from", "to", "stratum", "minus"]) $(id).value = "";
    $("measure").value = set.scores.length ? "0" : "prompt";
    $("by").value = String(set.policies.length - 1);
    falling = true;
    select();
  };

  // What is in the list, in which order -------------------------------------------------------------------------

  const keys = () => {
    if ($("measure").value === "prompt") return set.prompt.map((_, i) => -i);
    const measure = Number($("measure").value);
    const values = (i) => set.policies[i].scores[measure] || [];
    const own = values(Number($("by").value));
    const other = $("minus").value === "" ? null : values(Number($("minus").value));
    return set.prompt.map((_, i) => {
      const value = own[i];
      if (value === null || value === undefined) return null;
      if (other === null) return value;
      return other[i] === null || other[i] === undefined ? null : value - other[i];
    });
  };

  const search = (words) => {
    if (!haystack.length) {
      haystack = set.prompt.map((prompt, i) =>
        [set.prompts[prompt], ...set.policies.map((policy) => policy.text[i] ?? "")].join("\n").toLowerCase());
    }
    return (i) => haystack[i].includes(words);
  };

  const select = () => {
    const key = keys();
    const words = $("text").value.toLowerCase();
    const found = words ? search(words) : () => true;
    const stratum = $("stratum").value;
    const end = (id) => ($("measure").value === "prompt" || $(id).value === "" ? null : Number($(id).value));
    const from = end("from"), to = end("to");
    const chosen = [];
    for (let i = 0; i < key.length; i++) {
      if (stratum !== "" && set.stratum[i] !== Number(stratum)) continue;
      if (from !== null && !(key[i] !== null && key[i] >= from)) continue;
      if (to !== null && !(key[i] !== null && key[i] <= to)) continue;
      if (found(i)) chosen.push(i);
    }
    const sign = falling ? -1 : 1;
    chosen.sort((a, b) => {
      if (key[a] === null || key[b] === null) return (key[a] === null) - (key[b] === null) || a - b;
      return sign * (key[a] - key[b]) || a - b;
    });
    order = chosen;
    at = 0;
    $("list").scrollTop = 0;
    $("order").textContent = falling ? "highest first" : "lowest first";
    $("order").setAttribute("aria-pressed", String(falling));
    $("count").textContent = `${order.length.toLocaleString("en")} of ${key.length.toLocaleString("en")}`;
    heads();
    redraw();
  };

  // The rows in sight --------------------------------------------------------------------------------------------

  const shown = () => [...$("policies").querySelectorAll("input:checked")].map((box) => Number(box.value));

  const heads = () => {
    const by = Number($("by").value);
    const columns = shown().map((index, place) => {
      const sorted = index === by ? (falling ? "descending" : "ascending") : "none";
      const button = element("button", { type: "button", role: "columnheader", "aria-sort": sorted, "data-by": index },
        element("i", { class: `swatch s${set.policies[index].colour}` }), set.policies[index].label,
        index === by ? (falling ? " ↓" : " ↑") : "");
      button.title = `Sort by this policy (${place + 1})`;
      return button;
    });
    $("heads").replaceChildren(element("span", { role: "columnheader", text: "prompt" }), ...columns);
    $("list").style.setProperty("--columns", String(columns.length));
    $("list").style.setProperty("--row", `${ROW}px`);
  };

  const redraw = () => {
    drawn.clear();
    $("rows").replaceChildren();
    $("rows").style.height = `${order.length * ROW}px`;
    $("list").setAttribute("aria-rowcount", String(order.length + 1));
    draw();
  };

  const draw = () => {
    const list = $("list");
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
    const last = Math.min(order.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
    for (const [place, row] of drawn) {
      if (place < first || place >= last) {
        row.remove();
        drawn.delete(place);
      }
    }
    for (let place = first; place < last; place++) {
      if (drawn.has(place)) continue;
      const row = entry(place);
      drawn.set(place, row);
      $("rows").append(row);
    }
    for (const [place, row] of drawn) row.setAttribute("aria-selected", String(place === at));
    if (drawn.has(at)) list.setAttribute("aria-activedescendant", drawn.get(at).id);
    else list.removeAttribute("aria-activedescendant");
  };

  const entry = (place) => {
    const item = order[place];
    const by = Number($("by").value);
    const sample = set.sample ? `, response ${set.sample[item]}` : "";
    const where = element("div", { class: "where" },
      element("span", { text: set.strata[set.stratum[item]] + sample }), element("span", { text: `${place + 1}` }));
    const prompt = element("div", { role: "rowheader" }, where, said(set.prompts[set.prompt[item]]));
    const cells = shown().map((index) =>
      element("div", { role: "gridcell", class: index === by ? "own" : "" }, scores(index, item), answer(index, item)));
    const row = element("div", { class: "entry", role: "row", id: `entry-${place}`, "aria-rowindex": place + 2 }, prompt, ...cells);
    row.style.top = `${place * ROW}px`;
    row.dataset.place = place;
    return row;
  };

  const scores = (index, item) => {
    const policy = set.policies[index];
    const line = element("div", { class: "scores" });
    if ($("cost").value !== "") {
      const column = policy.scores[Number($("cost").value)] || [];
      const gauge = element("span", { class: "gauge", "aria-hidden": "true" }, element("i"));
      const most = largest(Number($("cost").value));
      gauge.firstChild.style.width = `${most > 0 ? Math.max(0, 100 * (column[item] ?? 0) / most) : 0}%`;
      line.append(element("span", { class: "cost" }, gauge, "cost ", element("b", { text: number(column[item]) })));
    }
    if ($("reward").value !== "") {
      const column = policy.scores[Number($("reward").value)] || [];
      line.append(element("span", {}, "reward ", element("b", { text: number(column[item]) })));
    }
    if (policy.cutSet.has(item)) line.append(element("span", { text: "cut off", title: "ended at the length limit" }));
    return line;
  };

  const largest = (measure) => {
    const score = set.scores[measure];
    score.largest ??= Math.max(...set.policies.map((p) => (p.scores[measure] || []).reduce((a, b) => Math.max(a, b ?? 0), 0)));
    return score.largest;
  };

  const answer = (index, item) => {
    const text = set.policies[index].text[item];
    if (text === null) return element("p", { class: "said none", text: "not asked" });
    return text === "" ? element("p", { class: "said none", text: "empty" }) : said(text);
  };

  const said = (text) => {
    const words = $("text").value.toLowerCase();
    const hit = words ? text.toLowerCase().indexOf(words) : -1;
    const start = hit > 80 ? hit - 60 : 0;
    const cut = (start ? "…" : "") + text.slice(start, start + MOST);
    return element("p", { class: "said" }, ...marked(cut, words));
  };

  const marked = (text, words) => {
    const low = text.toLowerCase();
    if (!words || low.length !== text.length) return [text];
    const parts = [];
    let end = 0;
    for (let hit = low.indexOf(words); hit >= 0; hit = low.indexOf(words, end)) {
      parts.push(text.slice(end, hit), element("mark", { text: text.slice(hit, hit + words.length) }));
      end = hit + words.length;
    }
    return [...parts, text.slice(end)];
  };

  // Keys, and one row in full ------------------------------------------------------------------------------------

  const go = (place) => {
    if (!order.length) return;
    at = Math.min(order.length - 1, Math.max(0, place));
    const list = $("list"), head = $("heads").offsetHeight;
    if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    if ((at + 1) * ROW > list.scrollTop + list.clientHeight - head) list.scrollTop = (at + 1) * ROW - list.clientHeight + head;
    draw();
    if ($("detail").open) detail();
  };

  const detail = () => {
    if (!order.length) return;
    const item = order[at], words = $("text").value.toLowerCase();
    $("detail-title").textContent = set.strata[set.stratum[item]];
    $("detail-place").textContent = `${at + 1} of ${order.length}`;
    $("detail-prompt").replaceChildren(...marked(set.prompts[set.prompt[item]], words));
    $("detail-answers").replaceChildren(...set.policies.map((policy) => {
      const title = element("h4", {}, element("i", { class: `swatch s${policy.colour}` }), policy.label);
      const body = element("pre", {}, ...marked(policy.text[item] ?? "not asked", words));
      const facts = set.scores.flatMap((score, i) =>
        policy.scores[i] ? [element("dt", { text: score.name }), element("dd", { text: number(policy.scores[i][item]) })] : []);
      return element("div", {}, title, body, element("dl", {}, ...facts));
    }));
    if (!$("detail").open) $("detail").showModal();
  };

  const sortBy = (index) => {
    falling = Number($("by").value) === index ? !falling : true;
    $("by").value = String(index);
    select();
  };

  const listen = () => {
    for (const id of ["measure", "by", "minus", "stratum"]) $(id).addEventListener("change", select);
    for (const id of ["text", "from", "to"]) $(id).addEventListener("input", select);
    for (const id of ["cost", "reward"]) $(id).addEventListener("change", redraw);
    $("policies").addEventListener("change", () => (heads(), redraw()));
    $("set").addEventListener("change", () => show(Number($("set").value)));
    $("order").addEventListener("click", () => ((falling = !falling), select()));
    $("reset").addEventListener("click", clear);
    $("browser").querySelector("form").addEventListener("submit", (event) => event.preventDefault());
    $("heads").addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) sortBy(Number(button.dataset.by));
    });
    let waiting = false;
    $("list").addEventListener("scroll", () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => ((waiting = false), draw()));
    });
    new ResizeObserver(draw).observe($("list"));
    $("rows").addEventListener("click", (event) => {
      const row = event.target.closest(".entry");
      if (!row || !getSelection().isCollapsed) return; // a text was selected, not a row
      go(Number(row.dataset.place));
      detail();
    });
    const page = () => Math.max(1, Math.floor($("list").clientHeight / ROW) - 1);
    const moves = {
      ArrowDown: () => go(at + 1), ArrowUp: () => go(at - 1), j: () => go(at + 1), k: () => go(at - 1),
      PageDown: () => go(at + page()), PageUp: () => go(at - page()), Home: () => go(0), End: () => go(order.length - 1),
      Enter: detail,
    };
    $("list").addEventListener("keydown", (event) => {
      if (event.target.closest("button") || event.ctrlKey || event.metaKey || event.altKey) return;
      const policy = shown()[Number(event.key) - 1];
      if (event.key in moves) moves[event.key]();
      else if (event.key >= "1" && event.key <= "9" && policy !== undefined) sortBy(policy);
      else return;
      event.preventDefault();
    });
    $("detail").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, j: 1, k: -1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      go(at + step);
    });
    $("previous").addEventListener("click", () => go(at - 1));
    $("next").addEventListener("click", () => go(at + 1));
    $("close").addEventListener("click", () => $("detail").close());
    $("detail").addEventListener("close", () => $("list").focus());
    $("detail").addEventListener("click", (event) => event.target === $("detail") && $("detail").close());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.target.closest("input, select, textarea, dialog")) return;
      event.preventDefault();
      $("text").focus();
    });
  };

  const begin = async () => {
    sets = await unpack();
    for (const one of sets) for (const policy of one.policies) policy.cutSet = new Set(policy.cut);
    choices("set", sets.map((one, i) => [i, one.name]));
    $("browser").hidden = false;
    listen();
    show(0);
    performance.mark("tail-ready");
  };

  if ($("data")) {
    begin().catch((error) => {
      $("trouble").textContent = `The tail browser could not start in this browser: ${error}`;
      $("trouble").hidden = false;
    });
  }
})();
