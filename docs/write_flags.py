"""Write docs/flags.md, the page of all flags, from the declarations that the parsers are made from.

    python docs/write_flags.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import calculate_prototypes
import create_sit_dataset
import evaluate
import generate_pseudo_labels
import make_demo
import make_spatial_prior
import make_toy_data
import measure_domain_distance
import train_procst
import train_semseg_on_source
import train_uda
from training.flags import flag_of, options_of, shown_default

SCRIPTS = (
    train_procst, create_sit_dataset, train_semseg_on_source, train_uda, make_spatial_prior,
    generate_pseudo_labels, calculate_prototypes, evaluate, measure_domain_distance, make_toy_data, make_demo,
)  # fmt: skip
HEAD = """# All flags

Made from the parsers by `python docs/write_flags.py`; `--help` of each script says the same. Within a name, `-` and `_`
are alike. A flag marked "continue" may differ when a run is continued; with any other, a continued run refuses another
value than it was started with.
Scripts that take `--source` or `--data_set` have `--print_data NAME`, too, which prints the description of a data set.
"""


def rows(field) -> str:
    """A row of the table; '' for a flag that `--help` hides."""
    option = field.metadata
    if option["hidden"]:
        return ""
    choices = f" One of: {', '.join(map(str, option['choices']))}." if option["choices"] else ""
    marked = "continue" if option["may_change"] else ""
    return f"| `{flag_of(field.name)}` | {shown_default(field)} | {marked} | {option['help']}.{choices} |\n"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for script in SCRIPTS:
        name = Path(script.__file__).name
        summary = script.__doc__.strip().splitlines()[0]
        parts.append(f"\n## {name}\n\n{summary}\n")
        for title, sections in {**script.GROUPS, **getattr(script, "MORE_GROUPS", {})}.items():
            heading = "" if len(script.GROUPS) == 1 else f"\n### {title[0].upper()}{title[1:]}\n"
            table = "".join(rows(field) for field in options_of(*sections).values())
            parts.append(f"{heading}\n| flag | default | | meaning |\n| --- | --- | --- | --- |\n{table}")
    return "".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(page())
