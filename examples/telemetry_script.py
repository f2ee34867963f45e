"""Any script's events in the same log as everything else: it finds the `railbus up` of ./learning by itself."""

import logging

from railbus import LearningTelemetry

with LearningTelemetry("preprocess").with_logging() as telemetry:
    for number, rows in enumerate((1000, 1000, 417)):
        telemetry.event("rows_written", part=number, rows=rows)
    logging.getLogger(__name__).warning("the last part is short", extra={"rows": rows})
