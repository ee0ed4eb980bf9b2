// The table of samples: filters, order, pages, and the ids of what is shown to take away.

const PAGE = 50, LONG = 220;

function startTable(samples) {
  const find = (id) => document.getElementById(id);
  const form = find("filters");
  if (!form) return;
  const state = { page: 0, group: 0, order: ORDERS.all, rows: [] };
  const columns = columnsOf(samples);

  function wanted() {
    const data = new FormData(form);
    const read = (name) => data.get(name) ?? "";
    return {
      view: read("view"), query: read("query").trim(), target: read("target"), selected: read("selected"),
      differs: data.has("differs"), most: read("most"), group: state.group,
    };
  }

  function refresh() {
    state.rows = sorted(samples, filtered(samples, wanted()), state.order);
    state.page = 0;
    draw();
  }

  function draw() {
    const pages = Math.max(Math.ceil(state.rows.length / PAGE), 1);
    const every = form.elements.every.checked;
    const visible = columns.filter((column) => every || !column.extra);
    find("samples-head").replaceChildren(headRow(visible));
    const start = state.page * PAGE;
    find("samples-body").replaceChildren(
      ...state.rows.slice(start, start + PAGE).map((i) => bodyRow(visible, i)));
    const total = samples.count.toLocaleString("en");
    const group = state.group ? `, near-duplicates of sample ${samples.id[samples.kin.get(state.group).first]}` : "";
    find("found").textContent = `${state.rows.length.toLocaleString("en")} of ${total} samples${group}`;
    find("page-said").textContent = `Page ${state.page + 1} of ${pages.toLocaleString("en")}`;
    find("previous").disabled = state.page === 0;
    find("next").disabled = state.page >= pages - 1;
    find("ungroup").hidden = !state.group;
  }

  function headRow(visible) {
    const row = document.createElement("tr");
    for (const column of visible) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.className = column.look ?? "";
      const [name, falling] = state.order;
      if (name === column.name) cell.ariaSort = falling ? "descending" : "ascending";
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.sort = column.name;
      button.textContent = column.title + (name === column.name ? (falling ? " ▼" : " ▲") : "");
      cell.append(button);
      row.append(cell);
    }
    return row;
  }

  function bodyRow(visible, i) {
    const row = document.createElement("tr");
    for (const column of visible) {
      const cell = document.createElement("td");
      cell.className = column.look ?? "";
      cell.append(...[column.cell(i)].flat());
      row.append(cell);
    }
    return row;
  }

  function take() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(samples, state.rows)], { type: "text/csv" }));
    link.download = `${wanted().view}-samples.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  function turn(pages) {
    state.page += pages;
    draw();
    find("samples-scroll").scrollTop = 0;
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    state.order = ORDERS.all;
    state.group = 0;
    setTimeout(refresh); // when the controls are as they were
  });
  function changed({ target }) {
    if (target.name === "every") return draw();
    if (target.name === "view") {
      state.order = ORDERS[target.value];
      state.group = 0;
    }
    clearTimeout(state.waiting);
    if (target.name === "query") state.waiting = setTimeout(refresh, 150);
    else refresh();
  }

  form.addEventListener("input", changed);
  form.addEventListener("change", (event) => event.target.matches("select") && changed(event));
  find("samples-head").addEventListener("click", (event) => {
    const name = event.target.dataset.sort;
    if (!name) return;
    const same = state.order[0] === name;
    state.order = [name, same ? !state.order[1] : name === "drawn"];
    refresh();
    find("samples-head").querySelector(`[data-sort="${name}"]`).focus();
  });
  find("samples-body").addEventListener("click", (event) => {
    if (!event.target.dataset.group) return;
    state.group = Number(event.target.dataset.group);
    refresh();
    find("ungroup").focus();
  });
  find("ungroup").addEventListener("click", () => {
    state.group = 0;
    refresh();
    find("samples-scroll").focus();
  });
  find("previous").addEventListener("click", () => turn(-1));
  find("next").addEventListener("click", () => turn(1));
  find("download").addEventListener("click", take);
  refresh();
}

function columnsOf(samples) {
  const { notes } = samples;
  const number = (name) => ({
    name, title: notes.numbers[name], look: "num", cell: (i) => say(samples[name][i]),
    extra: !["credibility", "loss", "drawn"].includes(name),
  });
  const columns = [{ name: "id", title: "id", look: "num", cell: (i) => String(samples.id[i]) }];
  if (notes.texts) {
    columns.push({ name: "text", title: "text", look: "say", cell: (i) => words(samples.text[i]) });
    columns.push({ name: "target", title: "target", look: "target", cell: (i) => words(targetOf(samples, i)) });
    if (notes.predicts) columns.push({ name: "prediction", title: "prediction", look: "target", cell: predicted });
  }
  columns.push(...Object.keys(notes.numbers).map(number));
  const credibility = columns.find((column) => column.name === "credibility");
  if (credibility) {
    credibility.cell = (i) => [
      samples.credibility[i].toFixed(2), ...(samples.flags[i] & DOUBTFUL ? [" ", flag("wrong?")] : [])];
  }
  columns.push({ name: "selected", title: "selected", cell: (i) => (samples.flags[i] & SELECTED ? "yes" : "no") });
  if (samples.kin.size) columns.push({ name: "group", title: "near-duplicate of", cell: kin });
  return columns;

  function predicted(i) {
    const cell = [words(predictionOf(samples, i))];
    return contradicted(samples, i) ? [...cell, " ", flag("≠")] : cell;
  }

  function kin(i) {
    if (!samples.group[i]) return "";
    const { first, size, split } = samples.kin.get(samples.group[i]);
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.group = samples.group[i];
    button.textContent = first === i ? `first of ${size}` : `${samples.id[first]}, one of ${size}`;
    return split ? [button, " ", flag("other target")] : button;
  }
}

function flag(text) {
  const mark = document.createElement("span");
  mark.className = "flag";
  mark.textContent = text;
  return mark;
}

// Texts are set as text, never as markup, and isolated from the direction of what is around them.
function words(text) {
  const whole = document.createElement("bdi");
  whole.textContent = text;
  if (text.length <= LONG) return whole;
  const more = document.createElement("details");
  const start = document.createElement("summary");
  start.append(Object.assign(document.createElement("bdi"), { textContent: `${text.slice(0, LONG)} …` }));
  more.append(start, whole);
  return more;
}
