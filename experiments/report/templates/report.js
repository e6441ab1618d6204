// Draws the figures, in the colours that the reader's system asks for, and answers to selects. Texts of rows are only ever set
// as textContent.
const dark = matchMedia("(prefers-color-scheme: dark)");
const byId = (id) => document.getElementById(id);
const make = (tag, text, className) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
};

// What is packed in the page: JSON, or lines of it, by gzip, in base64.
function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}

if (!("DecompressionStream" in window)) {
  const note = "This browser is too old to draw the figures: Chrome 80, Firefox 113 and Safari 16.4 can.";
  document.querySelector("main").prepend(make("p", note, "note"));
}
const DATA = await unpack("data").json();

// --- figures ---------------------------------------------------------------------------------------------------------

const drawn = new Map(); // figure -> what vegaEmbed gave
const OPTIONS = {
  mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false,
  tooltip: { theme: "page", disableDefaultStyle: true },
};

const selects = (id) => [...document.querySelectorAll(`select[data-figure="${id}"]`)];

// The specification of a figure with the data and parameters that are chosen now.
function specification(id, width) {
  const { spec, data } = DATA.figures[id];
  const chosen = selects(id);
  const keys = chosen.filter((select) => !select.dataset.param).map((select) => select.value);
  const rows = [...new Set(keys.length ? keys : Object.keys(data))].flatMap((key) => data[key]);
  const own = Object.fromEntries(chosen.filter((select) => select.dataset.param).map((s) => [s.dataset.param, s.value]));
  const params = (spec.params || []).map((param) => (param.name in own ? { ...param, value: own[param.name] } : param));
  return { ...spec, params, width, datasets: { rows } };
}

async function draw(id) {
  const turn = Symbol(id);
  const before = drawn.get(id);
  drawn.set(id, { turn });
  before?.result?.finalize();
  const result = await vegaEmbed(`#plot-${id}`, specification(id, "container"), {
    ...OPTIONS, config: DATA.themes[dark.matches ? "dark" : "light"],
  });
  if (drawn.get(id).turn !== turn) return result.finalize(); // another choice was made meanwhile
  drawn.set(id, { turn, result });
  if (id === "pareto") {
    result.view.addSignalListener("near", (_, value) => {
      if (value?.index?.length) showDetails(String(value.index[0]));
    });
  }
  if (id === "distribution") showWorst();
}

async function drawAll() {
  for (const id of Object.keys(DATA.figures)) await draw(id);
  document.body.dataset.ready = String(Number(document.body.dataset.ready || 0) + 1);
}

for (const select of document.querySelectorAll("select[data-figure]")) {
  select.addEventListener("change", () => draw(select.dataset.figure));
}
dark.addEventListener("change", drawAll);

// --- saving ----------------------------------------------------------------------------------------------------------

function save(blob, name) {
  const link = make("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A figure as a file is light on white, whatever the page is.
async function saveFigure(id, type) {
  const place = make("div");
  const config = { ...DATA.themes.light, background: "white" };
  const title = { text: DATA.figures[id].title, subtitle: selects(id).map((s) => s.selectedOptions[0].textContent).join(", ") };
  const result = await vegaEmbed(place, { ...specification(id, 720), title }, { ...OPTIONS, config });
  if (type === "svg") save(new Blob([await result.view.toSVG()], { type: "image/svg+xml" }), `${id}.svg`);
  else (await result.view.toCanvas(2)).toBlob((blob) => save(blob, `${id}.png`));
  result.finalize();
}

for (const button of document.querySelectorAll("button[data-save]")) {
  button.addEventListener("click", () => saveFigure(button.dataset.figure, button.dataset.save));
}

byId("save-rows").addEventListener("click", async () => {
  save(await unpack("rows").blob(), "results.jsonl");
});

// --- one policy ------------------------------------------------------------------------------------------------------

function showDetails(index) {
  const policy = DATA.policies[index];
  byId("details-policy").value = index;
  const facts = make("ul");
  for (const [name, value] of policy.facts) {
    const item = make("li");
    item.append(make("span", `${name} `), value);
    facts.append(item);
  }
  const line = make("p");
  line.append(make("code", policy.policy));
  byId("details").replaceChildren(line, facts, ...policy.commands.map(command));
}

function command(text) {
  const row = make("div", undefined, "command");
  const code = make("code", text);
  const button = make("button", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // where the clipboard is not to be had, what is to be copied is selected
    }
  });
  row.append(code, button);
  return row;
}

if (byId("details")) {
  byId("details-policy").addEventListener("change", (event) => showDetails(event.target.value));
  showDetails(byId("details-policy").value);
}

// --- worst predictions -----------------------------------------------------------------------------------------------

const visible = (text) => (text ?? "").replace(/\r?\n/g, "↵").replace(/\t/g, "⇥");

function showWorst() {
  const select = selects("distribution")[0];
  byId("worst-policy").textContent = select.selectedOptions[0].textContent;
  const rows = (DATA.worst[select.value] || []).map((item) => {
    const row = make("tr");
    const text = make("td");
    const [, space, token] = visible(item.token).match(/^(\s*)([^]*)$/); // what is marked begins with what is seen
    text.append("…", visible(item.before) + space, make("mark", token || "␣"), visible(item.after), "…");
    row.append(text);
    for (const name of ["kld", "p_reference", "p"]) row.append(make("td", item[name], "right"));
    for (const name of ["top_reference", "top"]) row.append(make("td", visible(item[name]).trim() || "␣"));
    row.append(make("td", item.position === null ? item.document : `${item.document}, ${item.position}`));
    return row;
  });
  byId("worst").tBodies[0].replaceChildren(...rows);
}

// --- texts side by side ----------------------------------------------------------------------------------------------

function showTexts() {
  const [piece, left, right] = ["piece", "left", "right"].map((name) => byId(`texts-${name}`).value);
  const said = [left, right].map((policy) => DATA.texts.policies[policy]?.[piece] || { ids: [], tokens: [] });
  const [a, b] = said.map(({ ids, tokens }) => (ids.length === tokens.length ? ids : tokens));
  let same = 0;
  while (same < a.length && same < b.length && a[same] === b[same]) same += 1;
  const all = same === a.length && same === b.length;
  byId("texts-prompt").textContent = DATA.texts.pieces[piece].prompt;
  const first = ["The first token differs.", "The first token is the same."][same] ?? `The first ${same} tokens are the same.`;
  byId("texts-same").textContent = all ? `All ${same} tokens are the same.` : first;
  ["left", "right"].forEach((side, i) => {
    const { tokens } = said[i];
    const parts = [tokens.slice(0, same).join("")];
    if (same < tokens.length) {
      parts.push(make("mark", tokens[same].replace(/\n/g, "↵\n")), make("span", tokens.slice(same + 1).join(""), "own"));
    }
    byId(`texts-${side}-text`).replaceChildren(...(tokens.length ? parts : [make("em", "not generated here")]));
  });
}

if (byId("texts")) {
  for (const name of ["piece", "left", "right"]) byId(`texts-${name}`).addEventListener("change", showTexts);
  showTexts();
}

// --- the table -------------------------------------------------------------------------------------------------------

const headings = [...document.querySelectorAll("#all thead th")];
headings.forEach((heading, column) => {
  heading.querySelector("button")?.addEventListener("click", () => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    headings.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.children[column].dataset.value;
    const body = byId("all").tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      if ((value(a) === "") !== (value(b) === "")) return value(a) === "" ? 1 : -1; // what is unknown stands last
      return (value(a) - value(b)) * (up ? 1 : -1);
    });
    body.append(...rows);
  });
});

await drawAll();
