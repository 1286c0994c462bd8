"""A domain to look at: a sheet of images, labels and overlays with a legend, and a page that says what was found."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..config import role_of
from ..labels import IGNORE_INDEX, palette, shortened
from ..storage import write_text
from .checking import DomainFacts, Finding, rarity
from .domains import Domain
from .transforms import resize_image, resize_labels

_WIDTH, _GAP = 288, 6  # pixels of a picture, and between pictures

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Domains</title><style>
body { font: 15px/1.4 sans-serif; margin: 1em auto; padding: 0 1em; max-width: 84em; color: #222 }
body { overflow-wrap: anywhere }
.sheets { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20em), 1fr)); gap: 1em }
figure { margin: 0 } figcaption { margin-bottom: .3em } .scroll { overflow-x: auto }
td, th { overflow-wrap: normal } td { white-space: nowrap }
td.long { min-width: 16em; overflow-wrap: anywhere; white-space: normal }
table { border-collapse: collapse } td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top }
td.number { text-align: right } .fault { color: #b00020; font-weight: bold } .note { color: #7a5c00 }
.bar { display: inline-block; height: .8em; background: #446fa8 } .rcs { background: #c96a2b }
.swatch { display: inline-block; width: 1em; height: 1em; margin-right: .5em; vertical-align: middle }
img { max-width: 100% }
</style></head><body>
<div class="sheets">{% for d in domains if d.picture %}
<figure><figcaption><b>{{ d.role }}</b>: {{ d.name }}</figcaption>
<a href="{{ d.file }}"><img alt="images, labels and overlays" src="data:image/jpeg;base64,{{ d.picture }}"></a>
</figure>
{% endfor %}</div>
<h1>{{ faults }} kind{{ "" if faults == 1 else "s" }} of faults, {{ findings|length - faults }} of
note{{ "" if findings|length - faults == 1 else "s" }}</h1>
{% if findings %}<div class="scroll"><table>
<tr><th></th><th>where</th><th>what</th><th>times</th><th>which</th></tr>
{% for f in findings %}<tr><td class="{{ f.severity }}">{{ f.severity }}</td><td>{{ f.domain }}</td>
<td class="long">{{ f.kind }}</td>
<td class="number">{{ f.count }}</td><td class="long">{{ f.example }}</td></tr>
{% endfor %}</table></div>{% else %}<p>Nothing was found.</p>{% endif %}
{% if said %}<h2>What a run makes of them</h2><ul>{% for line in said %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% for d in domains %}<h2>{{ d.role }}: {{ d.name }}</h2>
<p>{{ d.num_images }} images, {{ d.sizes }}.
{% if d.classes %}{{ d.ignored }} of the pixels have no class.</p>
</p><div class="scroll"><table>
<tr><th>class</th><th>share of labelled pixels</th><th></th><th>images</th>
{% if d.draws %}<th>drawn by rare class sampling</th><th></th>{% endif %}</tr>
{% for c in d.classes %}<tr><td><span class="swatch" style="background: rgb({{ c.color }})"></span>
{{ c.name }}</td>
<td class="number">{{ c.share }}</td><td><span class="bar" style="width: {{ c.share_width }}px"></span></td>
<td class="number">{{ c.images }}</td>{% if d.draws %}<td class="number">{{ c.drawn }}</td>
<td><span class="bar rcs" style="width: {{ c.drawn_width }}px"></span></td>{% endif %}</tr>
{% endfor %}</table></div>{% else %}No labels were read.</p>{% endif %}
{% endfor %}</body></html>
"""


def draw_sheet(domain: Domain, indices: Sequence[int], classes: Sequence[str]) -> Image.Image:
    """One line per image: the image and, if there are labels, their colours and both together; a legend below.

    White is ignored. Images are drawn at the width of the sheet's columns.
    """
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(classes)] = palette(classes)
    labelled = domain.rule is not None
    lines = []
    for index in indices:
        image = domain.image(index)
        size = (max(round(image.shape[0] * _WIDTH / image.shape[1]), 1), _WIDTH)
        small = resize_image(image, size)
        pictures = [small]
        if labelled:
            labels = resize_labels(domain.labels(index), size)
            overlay = np.where(
                labels[..., None] == IGNORE_INDEX, small, (small.astype(np.uint16) + colors[labels]) // 2
            )
            pictures += [colors[labels], overlay.astype(np.uint8)]
        lines.append(pictures)
    columns = 3
    if not labelled:  # images alone stand side by side
        singles = [pictures[0] for pictures in lines]
        lines = [singles[first : first + columns] for first in range(0, len(singles), columns)]
    font = ImageFont.load_default(size=13)
    legend = -(-len(classes) // columns) * 20 + _GAP if labelled else 0
    heights = [max(picture.shape[0] for picture in line) + _GAP for line in lines]
    sheet = Image.new("RGB", (columns * (_WIDTH + _GAP) + _GAP, sum(heights) + _GAP + legend), (240, 240, 240))
    top = _GAP
    for line, height in zip(lines, heights, strict=True):
        for column, picture in enumerate(line):
            sheet.paste(Image.fromarray(picture), (_GAP + column * (_WIDTH + _GAP), top))
        top += height
    draw = ImageDraw.Draw(sheet)
    for position, name in enumerate(classes if labelled else ()):
        x, y = _GAP + position % columns * (_WIDTH + _GAP), top + position // columns * 20
        red, green, blue = (int(value) for value in colors[position])
        draw.rectangle((x, y, x + 14, y + 14), fill=(red, green, blue), outline=(0, 0, 0))
        draw.text((x + 20, y - 1), shortened(name, 36), fill=(0, 0, 0), font=font)
    return sheet


def write_report(
    folder: Path,
    domains: dict[str, tuple[Domain, DomainFacts]],
    findings: Sequence[Finding],
    classes: Sequence[str],
    temperature: float,
    num_pictures: int = 8,
    said: Sequence[str] = (),
    frequencies: np.ndarray | None = None,
) -> None:
    """`folder`/index.html, which needs no network, and `folder`/<role>.png, the sheets in full, to which it leads.

    Args:
        domains: by role, or by role and place of several ("source 2").
        said: sentences about what a run makes of the domains.
        frequencies: (K,) of the classes in all domains together that are learned, if these are several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for role, (domain, facts) in domains.items():
        file_name = f"{role.replace(' ', '_')}.png"
        entry = {
            "role": role,
            "draws": role_of(role) != "test",
            "file": file_name,
            "name": facts.name,
            "num_images": facts.num_images,
            "sizes": _sizes(facts),
        }
        if facts.readable and num_pictures:
            picked = np.unique(np.linspace(0, len(facts.readable) - 1, num_pictures).round().astype(int))
            sheet = draw_sheet(domain, [facts.readable[position] for position in picked], classes)
            sheet.save(folder / file_name)
            file = io.BytesIO()
            sheet.save(file, format="JPEG", quality=88)
            entry["picture"] = base64.b64encode(file.getvalue()).decode()
        if facts.labelled:
            shares, drawn = rarity(facts, temperature, None if role_of(role) == "test" else frequencies)
            entry["ignored"] = f"{facts.ignored:.1%}" if facts.ignored == facts.ignored else "all"
            entry["classes"] = [
                {
                    "name": name,
                    "color": ",".join(map(str, color.tolist())),
                    "share": f"{share:.3%}",
                    "share_width": round(200 * share),
                    "images": int((facts.counts[:, position] > 0).sum()),
                    "drawn": f"{probability:.2%}",
                    "drawn_width": round(200 * probability),
                }
                for position, (name, color, share, probability) in enumerate(
                    zip(classes, palette(classes), shares, drawn, strict=True)
                )
            ]
        described.append(entry)
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)  # names of files come from anywhere
    faults = sum(finding.severity == "fault" for finding in findings)
    text = page.render(findings=findings, faults=faults, domains=described, said=said)
    write_text(folder / "index.html", text)


def _sizes(facts: DomainFacts) -> str:
    """The commonest sizes, width x height."""
    ordered = sorted(facts.sizes.items(), key=lambda pair: -pair[1])
    text = ", ".join(f"{width}x{height} ({count})" for (height, width), count in ordered[:3])
    return text + (f" and {len(ordered) - 3} other sizes" if len(ordered) > 3 else "") or "none readable"
