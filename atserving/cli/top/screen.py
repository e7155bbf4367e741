"""Show readings on the whole terminal, until the user has enough."""

from __future__ import annotations

import curses
import os
import time
from collections.abc import Callable
from contextlib import suppress

from atserving.cli.tables import printable
from atserving.cli.top import tables
from atserving.cli.top.changes import Reading
from atserving.errors import StartError

_KEYS = "q: quit   i: instances   arrows, page up, page down: scroll"
_TOP_LINES, _BOTTOM_LINES = 2, 1


def show(read: Callable[[], Reading | None], interval_s: float, app: str, *, instances: bool) -> None:
    """Draw what ``read`` returns, each interval, until the user presses q or Ctrl-C.

    Raises StartError if the terminal can't be drawn on.
    """
    try:
        curses.setupterm()
        can_draw = bool(curses.tigetstr("cup"))
    except curses.error:
        can_draw = False
    if not can_draw:
        name = printable(os.environ.get("TERM", ""))
        raise StartError(f"the terminal (TERM={name}) has no screen to draw on: --once prints a table")
    curses.wrapper(lambda window: _Screen(window, read, interval_s, app, instances).run())


class _Screen:
    def __init__(
        self,
        window: curses.window,
        read: Callable[[], Reading | None],
        interval_s: float,
        app: str,
        instances: bool,
    ) -> None:
        self._window = window
        self._read = read
        self._interval_s = interval_s
        self._app = app
        self._instances = instances
        self._first = 0
        self._reading: Reading | None = None

    def run(self) -> None:
        # Some terminals have no colours, and some can't hide their cursor.
        with suppress(curses.error):
            curses.curs_set(0)
        with suppress(curses.error):
            curses.use_default_colors()
            curses.init_pair(1, curses.COLOR_RED, -1)
        self._draw()
        while True:
            next_s = time.monotonic() + self._interval_s
            self._reading = self._read() or self._reading
            self._draw()
            while (left_s := next_s - time.monotonic()) > 0:
                self._window.timeout(max(int(left_s * 1000), 1))
                key = self._window.getch()
                if key == -1:
                    # The time is over, or standard input is at its end and has no more keys.
                    time.sleep(max(next_s - time.monotonic(), 0))
                    break
                if not self._take(key):
                    return
                self._draw()

    def _take(self, key: int) -> bool:
        """Obey a key; return False to end."""
        page = max(self._window.getmaxyx()[0] - _TOP_LINES - _BOTTOM_LINES - 1, 1)
        steps = {curses.KEY_UP: -1, curses.KEY_DOWN: 1, curses.KEY_PPAGE: -page, curses.KEY_NPAGE: page}
        if key in (ord("q"), ord("Q"), 27):
            return False
        if key == ord("i"):
            self._instances = not self._instances
        self._first = max(self._first + steps.get(key, 0), 0)
        return True

    def _draw(self) -> None:
        window = self._window
        height, _ = window.getmaxyx()
        window.erase()
        reading = self._reading
        if reading is None:
            self._line(0, "reading the metrics ...")
            window.refresh()
            return
        self._line(0, f"{time.strftime('%H:%M:%S')}  {tables.header(reading)}", curses.A_BOLD)
        found = tables.rows(reading, self._app, instances=self._instances)
        columns = tables.widths([tables.HEADERS, *(cells for _, cells in found)])
        warnings = reading.warnings[: max(height // 4, 1)]
        self._line(1, tables.aligned(tables.HEADERS, columns), curses.A_REVERSE)
        room = max(height - _TOP_LINES - _BOTTOM_LINES - len(warnings), 1)
        self._first = min(self._first, max(len(found) - room, 0))
        red = curses.color_pair(1) if curses.has_colors() else curses.A_BOLD
        for number, (load, cells) in enumerate(found[self._first : self._first + room]):
            style = red if tables.is_bad(load) else curses.A_NORMAL if load.version else curses.A_BOLD
            self._line(_TOP_LINES + number, tables.aligned(cells, columns), style)
        for number, warning in enumerate(warnings):
            self._line(height - _BOTTOM_LINES - len(warnings) + number, printable(warning), red)
        more = len(found) - room
        self._line(height - 1, _KEYS + (f"   ({more} more lines)" if more > 0 else ""), curses.A_DIM)
        window.refresh()

    def _line(self, row: int, text: str, style: int = 0) -> None:
        height, width = self._window.getmaxyx()
        if 0 <= row < height:
            # The last cell of the last line can't be written without scrolling.
            self._window.addnstr(row, 0, text, width - 1, style or curses.A_NORMAL)
