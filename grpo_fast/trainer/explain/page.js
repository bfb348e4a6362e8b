"use strict";
// All numbers are computed here again, in float64, from the log-probs and rewards of the record.
const { record, expected, names, most } = JSON.parse(document.getElementById("data").textContent);
const N = record.updates.length;
const $ = (id) => document.getElementById(id);

// What the sliders set. `token` is the chosen one: completion and place, from 0.
const recorded = () => ({
  update: 1,
  group: record.completions.length,
  low: record.objective.epsilon_low,
  high: record.objective.epsilon_high,
  beta: record.objective.beta,
  rewards: record.completions.map((c) => c.reward),
});
let state = recorded();
let stage = 0;
let token = widest();

// The token whose log-prob changes most, of those that are shown.
function widest() {
  let found = { i: 0, t: 0, change: -1 };
  record.logps[0].forEach((row, i) => row.slice(0, most).forEach((old, t) => {
    const change = Math.abs(record.logps[N][i][t] - old);
    if (change > found.change) found = { i, t, change };
  }));
  return { i: found.i, t: found.t };
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const meanOf = (values) => sum(values) / values.length;

function weights(lengths) {
  const G = lengths.length;
  const weight = {
    token_mean: () => 1 / sum(lengths),
    sequence_mean: (n) => 1 / (n * G),
    sequence_sum: () => 1 / G,
    fixed_length: () => 1 / (G * record.objective.max_length),
  }[record.objective.reduction];
  return lengths.map(weight);
}

function lossTerm(ratio, advantage, s) {
  const bounded = Math.min(Math.max(ratio, 1 - s.low), 1 + s.high);
  return -Math.min(ratio * advantage, bounded * advantage);
}

function k3(logp, ref) {
  const q = ref - logp;
  return Math.expm1(q) - q;
}

function lossAt(k, advantages, weight, s) {
  let total = 0;
  advantages.forEach((A, i) =>
    record.logps[k][i].forEach((logp, t) => {
      const term = lossTerm(Math.exp(logp - record.logps[0][i][t]), A, s);
      total += weight[i] * (term + s.beta * k3(logp, record.ref_logps[i][t]));
    }),
  );
  return total;
}

function compute(s) {
  const rewards = s.rewards.slice(0, s.group);
  const mean = meanOf(rewards);
  const std = Math.sqrt(sum(rewards.map((r) => (r - mean) ** 2)) / (rewards.length - 1));
  const differ = Math.max(...rewards) !== Math.min(...rewards);
  const scale = record.scale_rewards === "none" ? 1 : std + 1e-4;
  const advantages = rewards.map((r) => (differ ? (r - mean) / scale : 0));
  const weight = weights(rewards.map((_, i) => record.completions[i].tokens.length));
  const tokens = advantages.map((A, i) =>
    record.logps[s.update - 1][i].map((logp, t) => {
      const old = record.logps[0][i][t];
      const ref = record.ref_logps[i][t];
      const ratio = Math.exp(logp - old);
      const above = ratio > 1 + s.high;
      const below = ratio < 1 - s.low;
      const clipped = above && A > 0 ? 1 : below && A < 0 ? -1 : 0;
      const pull = clipped ? 0 : -A * ratio;
      const coefficient = weight[i] * (pull + s.beta * -Math.expm1(ref - logp));
      const own = (coefficient * -Math.expm1(logp)) / record.temperature;
      return { i, t, A, logp, old, ref, ratio, above, below, clipped, coefficient, own, weight: weight[i],
        kl: k3(logp, ref), term: lossTerm(ratio, A, s) };
    }),
  );
  const all = tokens.flat();
  return {
    mean, std, differ, advantages, tokens, all,
    loss: lossAt(s.update - 1, advantages, weight, s),
    lossAfter: lossAt(s.update, advantages, weight, s),
    klMean: meanOf(all.map((x) => x.kl)),
    clipFraction: meanOf(all.map((x) => (x.clipped ? 1 : 0))),
  };
}

// Elements and numbers. A <data> element has the full number as its value.
function el(tag, attributes = {}, ...children) {
  const made = tag.includes(":")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function fmt(x, digits = 3) {
  const short = x !== 0 && Math.abs(x) < 0.5 * 10 ** -digits ? x.toExponential(1) : x.toFixed(digits);
  return short.replaceAll("-", "−");
}

function num(name, x, digits, shown = fmt(x, digits)) {
  return el("data", { value: String(x), "data-name": name }, shown);
}

// A number with a fixed number of digits, and no sign before a zero.
function fixed(x, digits) {
  const text = x.toFixed(digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

// A cell is a text or a number, or { parts, more }: what is in it, and its attributes.
function table(label, head, rows) {
  const cell = (tag, x, scope) => {
    const { parts, more } = x.parts ? x : { parts: [x], more: {} };
    return el(tag, { ...scope, ...more }, ...parts);
  };
  const headings = head.map((x) => cell("th", x, { scope: "col" }));
  const lines = rows.map(([first, ...others]) =>
    el("tr", {}, cell("th", first, { scope: "row" }), ...others.map((x) => cell("td", x, {}))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    el("table", {}, el("thead", {}, el("tr", {}, ...headings)), el("tbody", {}, ...lines)));
}

const bars = { parts: [""], more: { "aria-hidden": "true" } }; // the head of a column of bars
const textCell = (x) => ({ parts: [x], more: { class: "text" } });
const cell = (...parts) => ({ parts, more: {} });
const fact = (...parts) => el("p", { class: "fact" }, ...parts);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function bar(x, largest, signed = true) {
  const made = el("div", { class: signed ? "bar" : "bar unsigned", "aria-hidden": "true" });
  const inner = el("span", { class: x < 0 ? "minus" : "plus" });
  inner.style.width = `${largest ? Math.min(100, (Math.abs(x) / largest) * 100) : 0}%`;
  if (x !== 0) made.append(inner);
  return made;
}

// The picture of all tokens: one button each, with a number; arrow keys move among them.
function tokenPicture(found, view) {
  const picture = el("div", { class: "tokens" });
  found.tokens.forEach((row, i) => {
    const line = el("div", { class: "line", role: "group", "aria-label": `Tokens of completion ${i + 1}` });
    const A = found.advantages[i];
    line.append(el("span", { class: "who" }, `#${i + 1} A `, fmt(A, 2)));
    row.slice(0, most).forEach((x) => {
      const word = record.completions[i].tokens[x.t];
      const { value, name, digits = 2, size, down, mark = "", told = "", stopped = false } = view(x);
      const chosen = i === token.i && x.t === token.t;
      const shown = fixed(value, digits);
      const number = num(`${name}.${i + 1}.${x.t + 1}`, value, digits, shown);
      const chip = el("button", {
        type: "button", class: `token${down ? " down" : ""}${stopped ? " stopped" : ""}`,
        "data-i": i, "data-t": x.t, tabindex: chosen ? "0" : "-1", "aria-pressed": String(chosen),
        "aria-label": `token “${word}”, completion ${i + 1}: ${name} ${shown}${told}`,
      }, el("span", { class: "word" }, word), el("span", { class: "value" }, number, mark));
      chip.style.setProperty("--mix", `${Math.round(45 * Math.min(1, size))}%`);
      line.append(chip);
    });
    if (row.length > most) line.append(el("span", {}, `and ${row.length - most} more, which count as well`));
    picture.append(line);
  });
  return picture;
}

function inspector(found) {
  const x = found.tokens[token.i][token.t];
  const s = state;
  const word = record.completions[x.i].tokens[x.t];
  const range = `${fmt(1 - s.low)} to ${fmt(1 + s.high)}`;
  const clip = x.clipped ? "stopped by the clip" : x.above || x.below ? "outside, but not stopped: its gradient leads back"
    : "inside the range";
  const side = x.coefficient < 0 ? "pushes this token up" : x.coefficient > 0 ? "pushes this token down"
    : "does not push this token";
  const part = (name, ...value) => [el("dt", {}, name), el("dd", {}, ...value)];
  return el("div", { class: "card inspector" },
    el("h3", {}, `Token “${word}” of completion ${x.i + 1}`),
    el("dl", {},
      ...part("log-prob when sampled", num("token.old", x.old, 4)),
      ...part("log-prob now", num("token.logp", x.logp, 4), `, probability ${fmt(Math.exp(x.logp), 4)}`),
      ...part("ratio ρ", `exp(${fmt(x.logp, 4)} − (${fmt(x.old, 4)})) = `, num("token.ratio", x.ratio, 4)),
      ...part("clip range", `${range}: ${clip}`),
      ...part("loss −min(ρ A, clip(ρ) A)", num("token.loss", x.term, 4), `, with A = ${fmt(x.A, 4)}`),
      ...part("k3", num("token.kl", x.kl, 4), `, with q = ${fmt(x.ref - x.logp, 4)}`),
      ...part("coefficient c", `w (−A ρ k + β (1 − e^q)) = `, num("token.coefficient", x.coefficient, 6),
        `, with w = ${fmt(x.weight, 5)} and k = ${x.clipped ? 0 : 1}: the gradient ${side}`),
      ...part("gradient of its logit", num("token.own", x.own, 6)),
    ));
}

function legend(...items) {
  return el("ul", { class: "legend" }, ...items.map((x) => el("li", {}, x)));
}

function secondUpdate() {
  if (state.update > 1 || N < 2) return [];
  const button = el("button", { type: "button", id: "second" }, "Look at update 2");
  button.addEventListener("click", () => {
    state.update = 2;
    render();
    $("update").focus();
  });
  return [fact("This is the first update: every ratio is 1, and nothing is clipped. "), button];
}

function svgText(x, y, text, anchor = "middle") {
  return el("svg:text", { x, y, "text-anchor": anchor }, text);
}

// The loss term against the ratio, for advantages of one sign, with the tokens on it.
function clipPlot(found, sign) {
  const tokens = found.all.filter((x) => Math.sign(x.A) === sign);
  const ratios = [1 - state.low - 0.3, 1 + state.high + 0.3, ...tokens.map((x) => x.ratio)];
  const [least, largest] = [Math.max(0, Math.min(...ratios) - 0.1), Math.min(3, Math.max(...ratios) + 0.1)];
  const term = (r) => lossTerm(r, sign, state);
  const ends = [term(least), term(largest), term(1 - state.low), term(1 + state.high)];
  const [bottom, top] = [Math.min(...ends) - 0.1, Math.max(...ends) + 0.1];
  const X = (r) => 40 + (290 * (Math.min(Math.max(r, least), largest) - least)) / (largest - least);
  const Y = (v) => 170 - (150 * (v - bottom)) / (top - bottom);
  const points = [least, 1 - state.low, 1 + state.high, largest].filter((r) => r >= least && r <= largest);
  const stopped = tokens.filter((x) => x.clipped).length;
  const word = sign > 0 ? "Positive" : "Negative";
  const edges = [Math.max(least, 1 - state.low), 1 + state.high];
  const label = `${word} advantage: ${plural(tokens.length, "token")}, ${stopped} stopped. The loss is a line `
    + (sign > 0 ? `that falls with the ratio and is flat above ${fmt(1 + state.high, 2)}.`
      : `that rises with the ratio and is flat below ${fmt(1 - state.low, 2)}.`);
  const picture = el("svg:svg", { viewBox: "0 0 340 205", role: "img", "aria-label": label },
    el("svg:rect", { class: "range", x: X(edges[0]), y: 20, width: X(edges[1]) - X(edges[0]), height: 150 }),
    el("svg:line", { class: "axis", x1: 40, x2: 330, y1: 170, y2: 170 }),
    el("svg:line", { class: "axis", x1: X(1), x2: X(1), y1: 20, y2: 175 }),
    el("svg:polyline", { class: "curve", points: points.map((r) => `${X(r)},${Y(term(r))}`).join(" ") }),
    svgText(X(1), 187, "1"), svgText(330, 202, "ratio ρ", "end"), svgText(4, 14, "loss term / |A|", "start"),
    svgText(X(edges[0]) - 4, 187, fmt(edges[0], 2), "end"), svgText(X(edges[1]) + 4, 187, fmt(edges[1], 2), "start"));
  for (const x of tokens) {
    const ratio = Math.min(x.ratio, largest);
    const [cx, cy] = [X(ratio), Y(term(ratio))];
    picture.append(x.clipped ? el("svg:rect", { class: "stop", x: cx - 4, y: cy - 4, width: 8, height: 8 })
      : el("svg:circle", { class: "go", cx, cy, r: 4 }));
  }
  return el("figure", {}, picture, el("figcaption", {}, `${word} advantage: `,
    num(sign > 0 ? "stopped.above" : "stopped.below", stopped, 0), ` of ${plural(tokens.length, "token")} stopped`,
    tokens.some((x) => x.ratio > largest) ? `; ratios above ${fmt(largest, 1)} are drawn at the edge` : ""));
}

function clipMark(x) {
  if (x.clipped) return { mark: " ✕", told: ", stopped by the clip", stopped: true };
  if (x.above || x.below) return { mark: " ↩", told: ", outside the range, not stopped" };
  return {};
}

const ratioView = (x) => ({ value: x.ratio, name: "ratio", digits: 3, size: Math.abs(Math.log(x.ratio)),
  down: x.ratio < 1, mark: x.ratio > 1 ? " ▲" : x.ratio < 1 ? " ▼" : "" });

const figures = {
  sample() {
    const cards = record.completions.map((c, i) =>
      el("li", { class: "card" },
        el("span", { class: "soft" }, `Completion ${i + 1}, ${plural(c.tokens.length, "token")}, `,
          c.ended ? "ended by the model" : "cut off at the length limit",
          i < state.group ? "" : ". Not used: G is " + state.group),
        el("p", { class: "said" }, c.text)));
    return [
      ...record.prompt.map((m) =>
        el("div", { class: "card" }, el("span", { class: "soft" }, m.role === "prompt" ? "Prompt" : `Prompt, ${m.role}`),
          el("p", { class: "said" }, m.content))),
      record.answer === null ? "" : el("p", {}, "Right answer: ", el("bdi", {}, record.answer)),
      el("ol", { class: "completions" }, ...cards),
    ];
  },
  reward() {
    const parts = Object.entries(record.source.reward_weights);
    const largest = Math.max(...state.rewards.map(Math.abs));
    const rows = record.completions.slice(0, state.group).map((c, i) => [
      String(i + 1), textCell(c.text),
      ...parts.map(([name]) => (c.rewards[name] === null ? "none" : fmt(c.rewards[name], 2))),
      cell(num(`reward.${i + 1}`, state.rewards[i]), state.rewards[i] === c.reward ? "" : " (changed)"),
      cell(bar(state.rewards[i], largest, state.rewards.some((r) => r < 0))),
    ]);
    const head = parts.map(([name, v]) => `${fmt(v, 2)} × ${name.replaceAll("_", "_\u200b")}`); // may break there
    return [table("Rewards", ["#", textCell("completion"), ...head, "reward", bars], rows)];
  },
  advantage(found) {
    const largest = Math.max(...found.advantages.map(Math.abs));
    const rows = found.advantages.map((A, i) => [
      String(i + 1), textCell(record.completions[i].text), num(`reward.${i + 1}`, state.rewards[i]),
      fmt(state.rewards[i] - found.mean),
      cell(num(`advantage.${i + 1}`, A), A > 0 ? " ▲" : A < 0 ? " ▼" : ""), cell(bar(A, largest)),
    ]);
    return [
      found.differ
        ? fact(`${plural(found.advantages.filter((A) => A > 0).length, "completion")} above the mean will be pushed up (▲), `
          + `${found.advantages.filter((A) => A < 0).length} below it down (▼).`)
        : fact("All rewards are equal, so every advantage is 0. This group teaches nothing"
          + (state.beta ? ": only the KL term is left." : ".")),
      el("p", {}, "mean ", num("mean", found.mean, 4), ", standard deviation ", num("std", found.std, 4)),
      table("Advantages", ["#", textCell("completion"), "reward", "reward − mean", "advantage", bars], rows),
    ];
  },
  ratio(found) {
    const ratios = found.all.map((x) => x.ratio);
    return [
      ...secondUpdate(),
      state.update > 1 ? fact(`After ${plural(state.update - 1, "update")} the ratios lie between `,
        num("ratio.least", Math.min(...ratios)), " and ", num("ratio.largest", Math.max(...ratios)), ".") : "",
      legend("Number below a token: its ratio", "▲ above 1, blue", "▼ below 1, orange", "stronger colour: farther from 1"),
      tokenPicture(found, ratioView), inspector(found),
    ];
  },
  clip(found) {
    const outside = found.all.filter((x) => (x.above || x.below) && !x.clipped).length;
    return [
      ...secondUpdate(),
      fact(num("clipped", found.all.filter((x) => x.clipped).length, 0), ` of ${plural(found.all.length, "token")} are stopped (`,
        num("clip_fraction", found.clipFraction, 3, `${fixed(100 * found.clipFraction, 1)} %`),
        `). Outside the range, but not stopped: ${outside}.`),
      el("div", { class: "plots" }, clipPlot(found, 1), clipPlot(found, -1)),
      legend("shaded: the clip range", "● has a gradient", "□ stopped", "tokens: ✕ and a dashed frame: stopped", "↩ outside, not stopped"),
      tokenPicture(found, (x) => ({ ...ratioView(x), mark: "", ...clipMark(x) })), inspector(found),
    ];
  },
  kl(found) {
    const largest = Math.max(1e-9, ...found.all.map((x) => x.kl));
    return [
      fact("Mean k3: ", num("kl_mean", found.klMean, 4), " nats. ", state.beta
        ? `It is in the loss with beta = ${fmt(state.beta, 3)}.` : "Beta is 0: it is not in the loss. Raise beta to see its effect."),
      legend("Number below a token: its k3", "stronger colour: larger"),
      tokenPicture(found, (x) => ({ value: x.kl, name: "k3", digits: 3, size: x.kl / largest, down: true })),
      inspector(found),
    ];
  },
  gradient(found) {
    const largest = Math.max(1e-12, ...found.all.map((x) => Math.abs(x.coefficient)));
    const count = (sign) => found.all.filter((x) => Math.sign(x.coefficient) === sign).length;
    return [
      fact(`The gradient pushes ${plural(count(-1), "token")} up (▲) and ${count(1)} down (▼). `
        + `${count(0)} have no gradient (■).`),
      legend("Number below a token: its coefficient c × 1000", "▲ c below 0, blue", "▼ c above 0, orange", "stronger colour: larger"),
      tokenPicture(found, (x) => ({ value: 1000 * x.coefficient, name: "c1000", digits: 2,
        size: Math.abs(x.coefficient) / largest, down: x.coefficient > 0,
        mark: x.coefficient < 0 ? " ▲" : x.coefficient > 0 ? " ▼" : " ■", told: clipMark(x).told })),
      inspector(found),
    ];
  },
  update(found) {
    const reports = record.updates[state.update - 1];
    const again = record.again[state.update - 1].slice(0, state.group);
    const before = meanOf(record.completions.slice(0, state.group).map((c) => c.reward));
    return [
      table("Losses", [textCell("loss"), `before update ${state.update}`, `after update ${state.update}`], [
        [textCell("with the sliders as they are"), num("loss", found.loss, 6), num("loss_after", found.lossAfter, 6)],
        [textCell("recorded by the trainer"), num("recorded.loss", reports.loss, 6), "–"],
      ]),
      el("p", {}, "Norm of the recorded gradient: ", num("grad_norm", reports.grad_norm), "."),
      fact("Mean reward of the recorded completions: ", num("before", before), ". Sampled again after update "
        + `${state.update}: `, num("after", meanOf(again.map((c) => c.reward))), "."),
      table("Completions before and after", ["#", textCell("before"), "reward", textCell(`after update ${state.update}`), "reward"], again.map((c, i) => [
        String(i + 1), textCell(record.completions[i].text), fmt(record.completions[i].reward), textCell(c.text), fmt(c.reward),
      ])),
    ];
  },
};

// The parts of the page that follow the state.
function render() {
  const found = compute(state);
  if (token.i >= state.group) token = { i: 0, t: 0 };
  const focused = document.activeElement;
  const onToken = focused && focused.classList.contains("token");
  $(`figure-${names[stage]}`).replaceChildren(...figures[names[stage]](found));
  if (onToken) chosenToken().focus();
  for (const [name, control] of Object.entries(controls)) control.show(name);
  const told = el("p", {},
    `Update ${state.update} of ${N}: loss `, num("summary.loss", found.loss, 5), " before, ",
    num("summary.after", found.lossAfter, 5), " after. ",
    `${found.all.filter((x) => x.clipped).length} of ${plural(found.all.length, "token")} stopped. Mean k3 `,
    num("summary.kl", found.klMean, 4), found.differ ? "." : ". All advantages are 0.");
  // A screen reader reads it again whenever it is written.
  if ($("summary").innerHTML !== told.innerHTML) $("summary").replaceChildren(...told.childNodes);
}

const chosenToken = () => document.querySelector(".stage:not([hidden]) .token[tabindex='0']");

// Sliders. The state keeps the recorded number until a slider moves, even where the slider rounds it.
const controls = {};
function addControl(place, name, label, limits, get, set, digits) {
  const input = el("input", { type: "range", id: name, ...limits });
  const shown = el("output", { for: name, id: `${name}-value` });
  const control = el("div", { class: "control" }, el("label", { for: name }, label), shown, input);
  $(place).append(control);
  input.addEventListener("input", () => { set(Number(input.value)); render(); });
  controls[name] = {
    show() {
      const text = fmt(get(), digits);
      if (Number(input.value) !== get()) input.value = get();
      shown.textContent = text;
      input.setAttribute("aria-valuetext", text);
      if (name.startsWith("reward")) {
        const unused = Number(name.slice(6)) > state.group;
        control.classList.toggle("unused", unused);
        input.disabled = unused;
      }
    },
  };
}

function addControls() {
  const set = (key) => (x) => { state[key] = x; };
  const simple = (place, name, label, key, limits, digits) =>
    addControl(place, name, label, limits, () => state[key], set(key), digits);
  const { objective, completions } = record;
  const width = Math.max(0.5, 2 * objective.epsilon_low, 2 * objective.epsilon_high);
  simple("of-step", "update", "Update", "update", { min: 1, max: N, step: 1 }, 0);
  simple("of-step", "group", "G, completions used", "group", { min: 2, max: completions.length, step: 1 }, 0);
  simple("of-loss", "low", "Epsilon low", "low", { min: 0, max: width, step: 0.01 }, 3);
  simple("of-loss", "high", "Epsilon high", "high", { min: 0, max: width, step: 0.01 }, 3);
  simple("of-loss", "beta", "Beta", "beta", { min: 0, max: Math.max(0.5, 2 * objective.beta), step: 0.01 }, 3);
  const rewards = completions.map((c) => c.reward);
  const [least, largest] = [Math.min(0, ...rewards), Math.max(1, ...rewards)];
  const step = largest - least > 2 ? (largest - least) / 100 : 0.01;
  completions.forEach((c, i) =>
    addControl("of-rewards", `reward${i + 1}`, `Completion ${i + 1}`, { min: least, max: largest, step },
      () => state.rewards[i], (x) => { state.rewards[i] = x; }, 3));
}

// Stages.
const buttons = [...document.querySelectorAll("#stages button")];
const sections = [...document.querySelectorAll(".stage")];

function go(to, focus) {
  stage = Math.min(Math.max(to, 0), sections.length - 1);
  sections.forEach((x, i) => {
    x.hidden = i !== stage;
    $(`figure-${names[i]}`).replaceChildren(); // what is hidden would be out of date
  });
  buttons.forEach((x, i) => (i === stage ? x.setAttribute("aria-current", "step") : x.removeAttribute("aria-current")));
  $("previous").disabled = stage === 0;
  $("next").disabled = stage === sections.length - 1;
  render();
  if (focus === "title") sections[stage].querySelector("h2").focus();
  if (focus === "button") buttons[stage].focus();
}

function moveToken(event) {
  const { i, t } = token;
  const length = (row) => Math.min(most, record.completions[row].tokens.length);
  const to = { ArrowRight: [i, t + 1], ArrowLeft: [i, t - 1], ArrowDown: [i + 1, t], ArrowUp: [i - 1, t] }[event.key];
  if (!to || to[0] < 0 || to[0] >= state.group || to[1] < 0) return;
  token = { i: to[0], t: Math.min(to[1], length(to[0]) - 1) };
  event.preventDefault();
  render();
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const target = event.target;
  if (target.classList.contains("token")) moveToken(event);
  else if (target.tagName !== "INPUT" && !target.closest(".scroll") && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
    event.preventDefault();
    go(stage + (event.key === "ArrowRight" ? 1 : -1), buttons.includes(target) ? "button" : "title");
  }
});
document.addEventListener("click", (event) => {
  const chip = event.target.closest(".token");
  if (!chip) return;
  token = { i: Number(chip.dataset.i), t: Number(chip.dataset.t) };
  chip.focus();
  render();
});
buttons.forEach((x, i) => x.addEventListener("click", () => go(i, "button")));
$("previous").addEventListener("click", () => go(stage - 1, "title"));
$("next").addEventListener("click", () => go(stage + 1, "title"));
$("equal").addEventListener("click", () => { state.rewards = state.rewards.map(() => state.rewards[0]); render(); });
$("reset").addEventListener("click", () => { state = recorded(); token = widest(); render(); });

// How far this page's numbers are from those that grpo_fast computed for the record.
function agreement() {
  let largest = 0;
  let count = 0;
  const see = (x, y) => {
    largest = Math.max(largest, Math.abs(x - y) / Math.max(1, Math.abs(y)));
    count += 1;
  };
  expected.forEach((want, k) => {
    const found = compute({ ...recorded(), update: k + 1 });
    for (const [x, y] of [[found.mean, want.mean], [found.std, want.std], [found.loss, want.loss],
      [found.lossAfter, want.loss_after], [found.klMean, want.kl_mean], [found.clipFraction, want.clip_fraction]]) see(x, y);
    found.advantages.forEach((x, i) => see(x, want.advantages[i]));
    for (const x of found.all) {
      see(x.ratio, want.ratios[x.i][x.t]);
      see(x.kl, want.kl[x.i][x.t]);
      see(x.coefficient, want.coefficients[x.i][x.t]);
      see(x.clipped, want.clipped[x.i][x.t]);
    }
  });
  $("agreement").append(`This page computed ${count} numbers of the recorded step again. Their largest difference from `
    + "grpo_fast is ", num("difference", largest, 2), ".");
}

document.documentElement.classList.add("scripted");
for (const id of ["stages", "steps", "controls", "summary"]) $(id).hidden = false;
addControls();
agreement();
go(0);
