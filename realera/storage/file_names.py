"""File names that every operating system accepts."""

import re
from datetime import datetime

FORBIDDEN = r'[<>:"|?*\x00-\x1f]'  # characters that Windows does not allow
RESERVED = r"(?i)^(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?$"  # names of devices on Windows
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
    """A path that every operating system accepts, with `/` between its parts.

    Placeholders for the time are filled in as ComfyUI's Save nodes do: %date:yyyy-MM-dd%, %year%,
    %month%, ...
    """
    name = re.sub("%date:(.+?)%", lambda match: _date(match[1], now), name)
    for word, code in TIMES.items():
        name = name.replace(word, now.strftime(code))
    return "/".join(map(_part, re.sub(FORBIDDEN, "_", name).replace("\\", "/").split("/")))


def _date(layout: str, now: datetime) -> str:
    def number(match: re.Match[str]) -> str:
        digits = now.strftime(DATE_PARTS.get(match[0]) or DATE_PARTS[match[0][0]])
        return digits if len(match[0]) > 1 else str(int(digits))

    return re.sub("yyyy|yy|MM?|dd?|hh?|mm?|ss?", number, layout)


def _part(part: str) -> str:
    if part.strip(". ") == "":  # "..", which the caller checks
        return part
    return re.sub(RESERVED, r"\1_\2", part.rstrip(". "))
