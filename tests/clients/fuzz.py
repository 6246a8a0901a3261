"""schemathesis with the description that the server at the address gives of itself; prints how many cases it made.

Cases follow the description or break it by turns. A server error, an answer that the description does not have, or a case that
breaks the description and is served all the same ends the script with its report.
"""

import re
import subprocess
import sys
from pathlib import Path

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)

address, max_examples = sys.argv[1:]
command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{address}/swagger.json", "--seed", "1"]
command += ["--phases", "coverage,fuzzing", "--max-examples", max_examples, "--checks", ",".join(CHECKS)]
command += ["--request-timeout", "300", "--generation-database", "none", "--no-color"]
ran = subprocess.run(command, capture_output=True, text=True)
found = re.search(r"(\d+) generated", ran.stdout)
if ran.returncode or not found:
    sys.exit(ran.stdout[-6000:] + ran.stderr[-2000:])
print(found[1])
