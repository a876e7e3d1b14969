// The parts of a page that answer to hover, click and keys. Each element with data-part is filled by
// the function of that name, from the page's data under data-key. No library, no network.
'use strict';

const DATA = JSON.parse(document.getElementById('data').textContent);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in made && key !== 'list') made[key] = value; else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const STYLE = getComputedStyle(document.documentElement);
const INK = STYLE.getPropertyValue('--minus').trim().split(' ').map(Number);

// colours over the page's own background: so they serve light and dark
function shade(value, end, isSigned) {
  if (value === null) return '';
  const share = Math.min(1, Math.abs(value) / end);
  const alpha = isSigned ? 0.85 * share : 0.85 * Math.sqrt(share);
  const name = isSigned && value > 0 ? '--plus' : '--minus';
  return `rgb(var(${name}) / ${alpha.toFixed(3)})`;
}

function legend(end, isSigned, unit) {
  const values = isSigned ? [-end, -end / 2, 0, end / 2, end] : [0, 0.05, 0.25, 0.5, 1].map(x => x * end);
  const line = element('p', {className: 'legend'}, `${unit}: `);
  for (const value of values) {
    const swatch = element('span', {}, String(Number(value.toPrecision(2))));
    swatch.style.background = shade(value, end, isSigned);
    line.append(swatch);
  }
  return line;
}

// Cells that hover, click, or arrow keys make the current one. cells is a matrix of elements or
// nulls, choose(row, column) is called for the current one.
function walk(box, cells, choose) {
  let row = 0, column = 0, current = null;
  box.tabIndex = 0;
  function go(i, j) {
    if (!cells[i] || !cells[i][j]) return;
    [row, column] = [i, j];
    if (current) current.classList.remove('current');
    current = cells[i][j];
    current.classList.add('current');
    choose(i, j);
  }
  cells.forEach((line, i) => line.forEach((cell, j) => {
    if (!cell) return;
    cell.addEventListener('mouseenter', () => go(i, j));
    cell.addEventListener('click', () => go(i, j));
  }));
  box.addEventListener('keydown', event => {
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (!step) return;
    event.preventDefault();
    if (current) go(row + step[0], column + step[1]); else go(0, 0);
  });
  box.addEventListener('focus', () => { if (!current) go(cells.findIndex(line => line.some(Boolean)), 0); });
  return go;
}

// a table of values, with the text of each cell, and a line below that describes the current one
function grid({rows, columns, values, texts, end = 1, isSigned = false, isSmall = false,
               describe, chosen}) {
  const table = element('table', {className: isSmall ? 'grid small' : 'grid'});
  const head = element('tr', {}, element('th'));
  for (const name of columns) head.append(element('th', {scope: 'col'}, name));
  table.append(element('thead', {}, head));
  const body = element('tbody');
  const cells = values.map((line, i) => {
    const tr = element('tr', {}, element('th', {scope: 'row'}, rows[i]));
    body.append(tr);
    return columns.map((_, j) => {
      const td = element('td', {}, texts ? texts[i][j] : '');
      if (line[j] === undefined) td.className = 'later';
      else if (line[j] === null) td.className = 'unknown';
      else td.style.background = shade(line[j], end, isSigned);
      tr.append(td);
      return line[j] === undefined ? null : td;
    });
  });
  table.append(body);
  const info = element('div', {className: 'info', role: 'status'}, 'Point at a cell, or use the arrow keys.');
  const go = walk(table, cells, (i, j) => {
    info.textContent = describe(i, j);
    if (chosen) chosen(i, j);
  });
  return {box: element('div', {}, element('div', {className: 'scroll'}, table), info), go};
}

function number(value, digits = 3) {
  return value === null || value === undefined ? 'unknown' : value.toFixed(digits);
}

// One tokens strip: what the current token reads is shaded. Strips of both models go together.
const strips = [];
function attention(box, data) {
  const info = element('div', {className: 'info', role: 'status'});
  const thumbs = element('div', {className: 'thumbs'});
  const large = element('div');
  const strip = element('div', {className: 'tokens', 'aria-label': 'tokens of the prompt'});
  const title = element('h3');
  const spans = data.tokens.map(token => element('span', {}, token));
  strip.append(...spans);
  let shown = null, place = data.tokens.length - 1;
  thumbs.style.gridTemplateColumns = `repeat(${data.patterns[0].length}, minmax(0, 64px))`;
  const buttons = [];

  function read(i) {  // what token i reads in the head that is shown
    place = i;
    const row = shown.pattern[i];
    spans.forEach((span, j) => {
      span.style.background = j <= i ? shade(row[j], 1000, false) : '';
      span.classList.toggle('current', i === j);
    });
    const best = row.map((value, j) => [value, j]).sort((a, b) => b[0] - a[0]).slice(0, 4)
      .map(([value, j]) => `${data.tokens[j]} (${j}) ${(value / 1000).toFixed(2)}`);
    info.textContent = `Token ${i}, ${data.tokens[i]}, reads ${best.join('   ')}`;
  }
  function show(layer, head) {
    shown = {layer, head, pattern: data.patterns[layer][head]};
    for (const button of buttons) {
      button.setAttribute('aria-pressed', button.dataset.head === `${layer}.${head}`);
    }
    title.textContent = `Head ${layer}.${head}: row reads column`;
    const made = grid({rows: data.tokens, columns: data.tokens, values: shown.pattern, end: 1000,
      isSmall: true,
      describe: (i, j) => `${data.tokens[i]} (${i}) reads ${data.tokens[j]} (${j}): `
        + `${(shown.pattern[i][j] / 1000).toFixed(3)}`,
      chosen: i => read(i)});
    large.replaceChildren(made.box);
    read(place);
  }
  data.patterns.forEach((layer, l) => layer.forEach((pattern, h) => {
    const canvas = element('canvas', {width: pattern.length, height: pattern.length});
    const context = canvas.getContext('2d');
    const pixels = context.createImageData(pattern.length, pattern.length);
    pattern.forEach((row, i) => row.forEach((value, j) => {
      pixels.data.set([...INK, 255 * Math.sqrt(value / 1000)], 4 * (i * pattern.length + j));
    }));
    context.putImageData(pixels, 0, 0);
    const button = element('button', {type: 'button', title: `head ${l}.${h}`}, canvas, `${l}.${h}`);
    button.dataset.head = `${l}.${h}`;
    button.setAttribute('aria-label', `head ${l}.${h}`);
    button.addEventListener('click', () => show(l, h));
    buttons.push(button);
    thumbs.append(button);
  }));
  walk(strip, [spans], (_, i) => strips.filter(one => one.length === data.tokens.length)
    .forEach(one => one.read(i)));
  strips.push({read, length: data.tokens.length});
  box.append(thumbs, title, strip, info, large, legend(1, false, 'attention'));
  show(...data.first);
}

function logit_lens(box, data) {
  const texts = data.guesses.map(row => row.map(place => place[0]));
  const made = grid({rows: data.rows, columns: data.tokens, values: data.probability, texts,
    describe: (i, j) => {
      const guesses = data.guesses[i][j].map((text, n) => `${text} ${number(data.chances[i][j][n], 2)}`);
      const right = j + 1 < data.tokens.length ? `right: ${data.tokens[j + 1]}, `
        + `probability ${number(data.probability[i][j])}, rank ${data.rank[i][j]}` : 'right: unknown';
      return `${data.rows[i]}, at ${data.tokens[j]} (${j})   ${right}\n${guesses.join('   ')}`;
    }});
  box.append(made.box, legend(1, false, 'probability of the right token'));
}

function patching(box, data) {
  const select = element('select', {ariaLabel: 'component'});
  data.maps.forEach((map, n) => select.append(element('option', {value: n}, map.title)));
  const place = element('div');
  function show() {
    const map = data.maps[select.value];
    const made = grid({rows: map.rows, columns: map.columns, values: map.values, end: data.end,
      isSigned: true, describe: (i, j) => `${map.title}\n${map.row} ${map.rows[i]}, ${map.column} `
        + `${map.columns[j]}: ${map.values[i][j] === null ? 'unknown'
          : (100 * map.values[i][j]).toFixed(1) + ' % restored'}`});
    place.replaceChildren(made.box);
  }
  select.addEventListener('change', show);
  box.append(select, place, legend(data.end, true, 'share restored'));
  show();
}

function token_loss(box, data) {
  const select = element('select', {ariaLabel: 'what is coloured'});
  data.kinds.forEach((kind, n) => select.append(element('option', {value: n}, kind.title)));
  const text = element('div', {className: 'tokens'}), place = element('div');
  const info = element('div', {className: 'info', role: 'status'}, 'Point at a token, or use the arrow keys.');
  const spans = data.tokens.map(token => element('span', {}, token));
  spans.forEach((span, i) => {
    text.append(span);
    if (data.tokens[i].includes('↵')) text.append(element('br'));
  });
  walk(text, [spans], (_, i) => {
    info.textContent = `${data.tokens[i]} (${i})   `
      + data.kinds.map(kind => `${kind.title} ${number(kind.values[i], 2)}`).join('   ') + '   nats';
  });
  function show() {
    const kind = data.kinds[select.value];
    spans.forEach((span, i) => {
      span.style.background = shade(kind.values[i], kind.end, kind.isSigned);
    });
    place.replaceChildren(legend(kind.end, kind.isSigned, 'nats'));
  }
  select.addEventListener('change', show);
  select.value = data.kinds.length - 1;
  box.append(select, text, info, place);
  show();
}

const PARTS = {attention, logit_lens, patching, token_loss};
for (const box of document.querySelectorAll('[data-part]')) {
  PARTS[box.dataset.part](box, DATA[box.dataset.key]);
}
