"""Writes the pages of the site into build/docs: those of docs/, one for each rule, and the API reference.

    python launch/docs.py                  # then: mkdocs build --strict -f build/docs/mkdocs.yml
    bash launch/docs.sh                    # both

The pages of docs/ are for GitHub too. So their links to files of the repository become links to pages here,
which show these files. What a page of a rule says stands in the class of the rule.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.docs_plot import weights_plot  # noqa: E402  # the root is on the path only now
from mtl_dist.weighting import COMBINATORS, RULES, Combinator, Needs, Rule  # noqa: E402

DOCS, BUILD = ROOT / "docs", ROOT / "build" / "docs"
TOP = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
TOP |= {"SECURITY.md": "security.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
API = {
    "Balancer": ["mtl_dist"],
    "Rules": ["mtl_dist.weighting.base", "mtl_dist.weighting.helpers", "mtl_dist.weighting.checks"],
    "Solvers": ["mtl_dist.solvers"],
    "Testing a rule": ["mtl_dist.testing", "mtl_dist.testing.laws"],
    "Probes": ["mtl_dist.probes", "mtl_dist.probes.base"],
    "Integrations": [
        "mtl_dist.integrations.accelerate",
        "mtl_dist.integrations.deepspeed",
        "mtl_dist.integrations.transformers",
        "mtl_dist.integrations.lightning",
        "mtl_dist.integrations.by_column",
    ],
    "Priors": ["mtl_dist.priors"],
    "Checkpoints": ["mtl_dist.checkpoint"],
    "Virtual ranks": ["mtl_dist.virtual"],
    "Recipes": ["mtl_dist.recipes"],
    "Tracking": ["mtl_dist.tracking", "mtl_dist.tracking.report"],
    "Training": ["mtl_dist.train"],
}
BLIND = {
    Needs.LOSSES: "It reads losses only. It sees neither how long the gradients of the tasks are, "
    "nor whether they conflict.",
    Needs.NORMS: "It reads how long the gradients are, not where they point. It cannot see whether tasks "
    "conflict.",
    Needs.GRAM: "It sees all inner products of the gradients, where they are measured. With a probe at the "
    "features and one task in each sample, these products are 0 between different tasks, so it sees no "
    "conflicts there ([which probe](../probes.md)).",
}
NAV = [
    ("Start here", "index.md"),
    ("Use it", "usage.md"),
    ("Real trainers", "gallery.md"),
    ("Rules", "rules.md"),
    ("Probes", "probes.md"),
    ("Engines", "engines.md"),
    ("Clusters", "clusters.md"),
    ("Recipes", "recipes.md"),
    ("Five systems", "systems.md"),
    ("Watch", "watching.md"),
    ("Groups of tasks", "groups.md"),
    ("Debug", "debugging.md"),
    ("What is refused", "refusals.md"),
    ("Write your own", "writing.md"),
    ("Choosing a rule", "choosing.md"),
    ("Results", "results.md"),
    ("Glossary", "glossary.md"),
    ("Architecture", "architecture.md"),
    ("Contribute", "contributing.md"),
    ("Security", "security.md"),
    ("Changes", "changelog.md"),
    ("中文", "zh/README.md"),
]


def page_of(path: Path) -> str:
    """The page of the site, as a path, that shows a file of the repository."""
    relative = path.relative_to(ROOT)
    if str(relative) in TOP:
        return TOP[str(relative)]
    if relative.parts[0] == "docs":
        return str(Path(*relative.parts[1:]))
    if relative.suffix in (".png", ".svg", ".md"):
        return str(Path("source") / relative)
    return str(Path("source") / f"{relative}.md")


def on_site(text: str, source: Path, page: str, needed: set[Path]) -> str:
    """The text of a file with links for the site.

    Args:
        text: Markdown.
        source: the file.
        page: the page that it becomes.
        needed: gets the files of the repository that the text links to.

    Raises:
        FileNotFoundError: a link leads nowhere.
    """

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        file = (source.parent / target).resolve()
        if not file.exists():
            raise FileNotFoundError(f"{source.relative_to(ROOT)}: the link {target} leads nowhere")
        if file.is_dir():
            inside = file / "README.md"
            file = inside if inside.exists() else min(file.glob("*.py"))
        needed.add(file)
        return os.path.relpath(page_of(file), Path(page).parent) + anchor

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)  # code keeps its brackets
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def write_text_pages() -> None:
    """The pages of docs/, those at the top, and the files that they link to."""
    waiting = {*DOCS.glob("*.md"), *DOCS.glob("zh/*.md"), *(ROOT / name for name in TOP)}
    done: set[Path] = set()
    while waiting := waiting - done:
        for file in sorted(waiting):
            done.add(file)
            target = BUILD / "pages" / page_of(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix in (".png", ".svg"):
                shutil.copy(file, target)
            elif file.suffix == ".md":
                text = re.sub(r"<!-- run first:\n.*?-->", "", file.read_text("utf-8"), flags=re.DOTALL)
                text = re.sub(r"^```python no-run$", "```python", text, flags=re.MULTILINE)
                target.write_text(on_site(text, file, page_of(file), waiting), encoding="utf-8")
            else:
                name, language = (
                    file.relative_to(ROOT),
                    {".py": "python", ".yaml": "yaml"}.get(file.suffix, "text"),
                )
                target.write_text(
                    f"# {name}\n\n````{language}\n{file.read_text('utf-8')}````\n", encoding="utf-8"
                )


def rule_page(name: str, cls: type[Rule]) -> str:
    """The page of a rule: formula, paper, cost, what it reads and does not see, its weights on the toy."""
    lines = (inspect.getdoc(cls) or "").partition("\n")[0]
    is_combinator = issubclass(cls, Combinator)
    needs = "what its inner rule reads" if is_combinator else cls.needs.name.lower()
    facts = {
        "name in YAML and on the command line": f"`{name}`",
        "from": cls.paper,
        "cost of the weights": cls.cost,
        "reads": needs,
    }
    text = f"# {cls.__name__}\n\n{lines}\n\n| fact | value |\n|---|---|\n"
    text += "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    if not is_combinator:
        text += f"\n## What it is blind to\n\n{' '.join(blind_to(cls))}\n"
        text += "\n## Its weights on the toy\n\n" + weights_plot(cls.example(("L1", "L2")), cls.__name__)
    return text + f"\n## Reference\n\n::: {cls.__module__}.{cls.__name__}\n"


def blind_to(cls: type[Rule]) -> Iterable[str]:
    """Sentences about what a rule cannot see, from what it declares."""
    example = cls.example(("L1", "L2"))
    if not example.compares:
        yield "It compares nothing: neither losses nor gradients change its weights."
    else:
        yield BLIND[cls.needs]
    if example.degrees is None:
        yield "Its weights depend on the units of the losses."
    else:
        for degree, of in zip(example.degrees, ("losses", "gradients"), strict=True):
            if degree:
                yield f"If all {of} are multiplied by s, its weights are multiplied by s^({degree:g})."
            elif example.compares:
                yield f"A common factor of all {of} does not change its weights."
    if example.positive_losses:
        yield "It takes no losses <= 0."
    for law, reason in example.breaks.items():
        yield f"It does not keep the [law](../writing.md#does-it-keep-the-laws) `{law}`: {reason}."


def write_rule_pages() -> list[tuple[str, str]]:
    """The pages of all rules and combinators. Returns their titles and paths."""
    folder = BUILD / "pages" / "rules"
    folder.mkdir(parents=True)
    entries = []
    for name, cls in sorted({**RULES, **COMBINATORS}.items()):
        (folder / f"{name}.md").write_text(rule_page(name, cls), encoding="utf-8")
        entries.append((cls.__name__, f"rules/{name}.md"))
    index = BUILD / "pages" / "rules.md"
    text = index.read_text("utf-8")
    for name, cls in {**RULES, **COMBINATORS}.items():
        text = text.replace(
            f"| `{cls.__name__}` | `{name}` |", f"| [`{cls.__name__}`](rules/{name}.md) | `{name}` |"
        )
    index.write_text(text, encoding="utf-8")
    return entries


def write_api_pages() -> list[tuple[str, str]]:
    """One page for each entry of `API`. Returns their titles and paths."""
    folder = BUILD / "pages" / "api"
    folder.mkdir(parents=True)
    entries = []
    for title, modules in API.items():
        path = f"api/{title.lower().replace(' ', '_')}.md"
        shown = "    options:\n      inherited_members: true\n"
        body = "".join(f"\n::: {module}\n{shown}" for module in modules)
        (BUILD / "pages" / path).write_text(f"# {title}\n{body}", encoding="utf-8")
        entries.append((title, path))
    return entries


def configuration(rules: list[tuple[str, str]], api: list[tuple[str, str]]) -> Mapping[str, object]:
    """Of mkdocs."""
    nav: list[Mapping[str, object]] = []
    for title, path in NAV:
        if path == "rules.md":
            nav.append({title: [{"All rules": path}, *({name: page} for name, page in rules)]})
        else:
            nav.append({title: path})
    nav.insert(-4, {"API": [{name: page} for name, page in api]})
    return {**yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text("utf-8")), "nav": nav}


def main() -> None:
    """Writes build/docs anew."""
    shutil.rmtree(BUILD, ignore_errors=True)
    (BUILD / "pages").mkdir(parents=True)
    write_text_pages()
    shutil.copytree(DOCS / "site", BUILD / "pages" / "site", ignore=shutil.ignore_patterns("*.yml"))
    settings = configuration(write_rule_pages(), write_api_pages())
    (BUILD / "mkdocs.yml").write_text(
        yaml.safe_dump(settings, allow_unicode=True, sort_keys=False), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
