"""The page's style sheet: light and dark, wide and narrow, on paper."""

LIGHT = """
  --paper: #ffffff; --card: #f6f7f9; --ink: #1a1d21; --soft: #5b636d; --grid: #e3e6ea; --one: #8a929c;
  --ours: #1757b8; --reference: #6c737d; --eager: #b35300; --torchjd: #157347; --libmtl: #8a35b8;
  --copy: #2c3138; --passes: #0b7285; --native: #c01f5b; --other: #7a5c00;
  --k0: #4aa3d8; --k1: #2f86c4; --k2: #2468ad; --k3: #254b91; --k4: #2b3172; --k5: #26184f;
"""
DARK = """
  --paper: #14171b; --card: #1d2126; --ink: #e8eaed; --soft: #a2abb6; --grid: #2d3239; --one: #79828d;
  --ours: #6fb0ff; --reference: #a3abb5; --eager: #f2a154; --torchjd: #58c792; --libmtl: #cb95f5;
  --copy: #d5dae0; --passes: #4fc3d7; --native: #ff7fa9; --other: #d9bd5a;
  --k0: #4a7fae; --k1: #5b98cb; --k2: #72b1e2; --k3: #93c8ee; --k4: #b9dcf5; --k5: #e2f1fb;
"""
LOOKS = ("ours", "reference", "eager", "torchjd", "libmtl", "copy", "passes", "native", "other",
         "k0", "k1", "k2", "k3", "k4", "k5")  # fmt: skip
COLOURS = "\n".join(f".{look} {{ --look: var(--{look}); }}" for look in LOOKS)

STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
{COLOURS}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.35rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 2px solid var(--ink); }}
h3 {{ font-size: 1.1rem; margin: 2.25rem 0 .25rem; }}
h4 {{ font-size: .95rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }}
p {{ max-width: 46rem; margin: .4rem 0; overflow-wrap: anywhere; }}
.soft, figcaption {{ color: var(--soft); font-size: .875rem; }}
.summary {{ background: var(--card); border-left: 4px solid var(--ours); padding: .6rem 1rem; margin: 1rem 0; }}
.summary p {{ font-size: 1.05rem; max-width: 60rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .75rem 0; font-size: .9rem; }}
dt {{ color: var(--soft); }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
ul {{ padding-left: 1.2rem; margin: .4rem 0; }}
li {{ overflow-wrap: anywhere; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem;
  margin: .75rem 0; align-items: start; }}
figure {{ margin: 0; padding: .75rem; background: var(--card); border-radius: 6px; min-width: 0; break-inside: avoid; }}
figcaption {{ margin-top: .25rem; overflow-wrap: anywhere; }}
.chart {{ display: block; width: 100%; height: auto; max-width: 30rem; margin: 0 auto; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .5rem 0; padding: 0; list-style: none;
  font-size: .875rem; }}
figure.spaced {{ margin: .75rem 0; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 1rem; }}
.key {{ width: 28px; height: 14px; vertical-align: -2px; margin-right: .35rem; }}
svg text {{ font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }}
svg .axis {{ font-style: italic; }}
svg .row {{ fill: var(--ink); }}
svg .end {{ fill: var(--look); font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 3px; }}
.grid {{ stroke: var(--grid); }}
.rule {{ stroke: var(--grid); stroke-dasharray: 1 3; }}
.one {{ stroke: var(--one); stroke-width: 1.5; }}
.line {{ fill: none; stroke: var(--look); stroke-width: 1.75; stroke-linejoin: round; }}
.line.ours {{ stroke-width: 2.5; }}
.line.copy, .line.reference {{ stroke-dasharray: 5 3; }}
.line.native {{ stroke-dasharray: 2 2; }}
.line.law {{ stroke-width: 1; stroke-dasharray: 2 3; opacity: .8; }}
.mark {{ fill: var(--look); stroke: var(--card); stroke-width: .75; }}
.hollow {{ fill: var(--card); stroke: var(--look); stroke-width: 1.5; }}
.bar {{ fill: var(--look); }}
.part {{ stroke: var(--card); stroke-width: .75; }}
.bars {{ display: block; overflow: visible; }}
.scroll {{ overflow-x: auto; margin: .5rem 0; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }}
th {{ color: var(--soft); font-weight: 600; vertical-align: bottom; }}
.number {{ text-align: right; }}
.wide {{ width: 45%; min-width: 8rem; }}
table.full, table.barred {{ width: 100%; }}
.wrong {{ color: var(--native); font-weight: 600; }}
.law-text sup {{ font-size: .75em; line-height: 0; }}
@media (max-width: 40rem) {{
  body {{ padding: 1rem .75rem 3rem; }}
  .barred thead {{ display: none; }}
  .barred tr {{ display: flex; flex-wrap: wrap; column-gap: .9rem; padding: .35rem 0;
    border-bottom: 1px solid var(--grid); }}
  .barred td {{ border: 0; padding: 0; }}
  .barred td:first-child {{ flex-basis: 100%; font-weight: 600; }}
  .barred td.wide {{ flex-basis: 100%; }}
  .barred td:empty {{ display: none; }}
  .barred td[data-name]::before {{ content: attr(data-name) " "; color: var(--soft); }}
  figure {{ padding: .6rem .5rem; }}
}}
@media print {{
  :root {{ color-scheme: light; {LIGHT} }}
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  figure, .summary {{ background: none; border: 1px solid var(--grid); }}
  .summary {{ border-left: 3px solid var(--ours); }}
  .charts {{ grid-template-columns: repeat(2, 1fr); }}
  .scroll {{ overflow: visible; }}
  table {{ font-size: 7pt; }}
  th, td {{ white-space: normal; padding-right: .4rem; }}
  tr, h3, h4 {{ break-inside: avoid; }}
  h2, h3, h4 {{ break-after: avoid; }}
}}
"""
