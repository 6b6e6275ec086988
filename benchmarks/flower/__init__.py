"""The same federated run in Flower, a system that others wrote, and in this project: do they agree, and at what cost?

Equal numbers from two implementations that share neither rounds, messages nor averages say more than a test of one of
them can. Only this folder imports ``flwr``; it comes with the extra ``flower``.
"""

import os

# Before flwr and ray are imported, which read them then: nothing is reported to anybody.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
