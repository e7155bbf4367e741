"""Settings of all tests."""

import structlog
from hypothesis import HealthCheck, settings

# A busy machine may take long over one example, or over generating it.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# structlog's default draws each exception with its local variables, which takes about 20 ms.
_renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
structlog.configure(processors=[structlog.processors.add_log_level, _renderer])
