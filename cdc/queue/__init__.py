"""The durable queue between one source and its sinks.

queue.py    what others see: any thread may call it       orders.py   what its one writer is told to write
file.py     the open file: batches, cursors, facts        format.py   how the file is made, recognised, upgraded
parked.py   the parked changes in it                      offline.py  the file as it is read without a daemon
tail.py     the newest batches, in memory                 stats.py    how full it is
reach.py    whether it can serve a target                 handover.py what is on its way to its writer
"""

from cdc.queue.offline import ParkedInFile, QueueOnDisk, read_status
from cdc.queue.orders import Stored
from cdc.queue.queue import Queue
from cdc.queue.stats import QueueStats

__all__ = ["ParkedInFile", "Queue", "QueueOnDisk", "QueueStats", "Stored", "read_status"]
