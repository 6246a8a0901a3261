from commands import process_as_before as process_as_before
from commands import run as run
