"""Names of files that every system can hold."""

import re
from datetime import datetime

FORBIDDEN = r'[<>:"|?*\x00-\x1f]'  # in a name on Windows
RESERVED = r"(?i)^(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?$"  # a device there, whatever follows
TIMES = {
    "%year%": "%Y",
    "%month%": "%m",
    "%day%": "%d",
    "%hour%": "%H",
    "%minute%": "%M",
    "%second%": "%S",
}
DATE_PARTS = {"yyyy": "%Y", "yy": "%y", "M": "%m", "d": "%d", "h": "%H", "m": "%M", "s": "%S"}


def portable(name: str, now: datetime) -> str:
    """The path with `/` between its parts, none of which Windows would refuse.

    The time is put in as ComfyUI's own Save nodes do it: %date:yyyy-MM-dd%, %year%, %month%, ...
    """
    name = re.sub("%date:(.+?)%", lambda found: _date(found[1], now), name)
    for word, code in TIMES.items():
        name = name.replace(word, now.strftime(code))
    return "/".join(map(_part, re.sub(FORBIDDEN, "_", name).replace("\\", "/").split("/")))


def _date(layout: str, now: datetime) -> str:
    def put(found: re.Match[str]) -> str:
        number = now.strftime(DATE_PARTS.get(found[0]) or DATE_PARTS[found[0][0]])
        return number if len(found[0]) > 1 else str(int(number))

    return re.sub("yyyy|yy|MM?|dd?|hh?|mm?|ss?", put, layout)


def _part(part: str) -> str:
    if part.strip(". ") == "":  # a step up, which is looked at elsewhere
        return part
    return re.sub(RESERVED, r"\1_\2", part.rstrip(". "))
