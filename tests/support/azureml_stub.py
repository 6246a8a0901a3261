"""A stub of Azure ML's control plane and of its storage, as azure-ai-ml calls them: resources that are put and read again,
blobs that are uploaded and downloaded, jobs. All hosts are one HTTPS server on the loopback interface.

It knows the calls that the real client makes in the notebooks, and notes every other one in `unknown`. Its answers have what
the client reads of them, and were never compared with the real service's. An online endpoint passes requests on to `score_url`;
`run_job` is a batch job.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import trustme
from aiohttp import ClientSession, web
from in_a_thread import in_a_thread

WORKSPACE = "/subscriptions/subscription/resourceGroups/group/providers/Microsoft.MachineLearningServices/workspaces/workspace"
REGION = "https://stub.api.azureml.ms"
ACCOUNT, CONTAINER = "stubstorage", "azureml-blobstore"
HOSTS = (
    "management.azure.com",
    "eastus.api.azureml.ms",
    "stub.api.azureml.ms",
    f"{ACCOUNT}.blob.core.windows.net",
    "stable.stub.inference.ml.azure.com",
)
TIME = "2026-11-26T12:00:00+00:00"
KEY = base64.b64encode(b"key of the storage account").decode()


@dataclass
class BatchJob:
    """What a batch job is given: the deployment's code, the files of its input, and its body as it was put."""

    code: Path
    source: Path
    output: Path
    deployment: dict[str, Any]


@dataclass
class AzureStub:
    """`resources` are by their path below the workspace, in lower case; `blobs` by their name."""

    run_job: Callable[[BatchJob], None]
    score_url: str = ""
    folder: Path = Path()
    port: int = 0
    ca_pem: bytes = b""
    resources: dict[str, dict[str, Any]] = field(default_factory=dict)
    blobs: dict[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)
    put: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was put last, of each resource, those included that were deleted."""
    deleted: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        host, path = request.host.partition(":")[0], request.path
        self.calls.append(f"{request.method} {host}{request.path_qs}")
        if "blob.core" in host:
            return await self._blob(request)
        if path == "/discovery":
            return web.json_response({"api": REGION, "history": REGION, "experimentation": REGION})
        assert request.headers["Authorization"].startswith("Bearer "), path
        self.tokens.add(request.headers["Authorization"].removeprefix("Bearer "))
        if "inference" in host:
            return await self._inference(request)
        body = await request.json() if request.can_read_body and request.content_length else {}
        if (known := self._special(request.method, path, body, request)) is not None:
            return web.json_response(known)
        if path.lower().startswith(WORKSPACE.lower() + "/"):
            return self._resource(request, path[len(WORKSPACE) + 1 :], body)
        return self._not_known(request)

    def _not_known(self, request: web.Request) -> web.Response:
        self.unknown.append(f"{request.method} {request.host}{request.path_qs}")
        return web.json_response({"error": {"code": "NotFound", "message": f"{request.method} {request.path}"}}, status=404)

    # ---- resources ---------------------------------------------------------------------------------------------------

    def _special(self, method: str, path: str, body: dict[str, Any], request: web.Request) -> dict[str, Any] | None:
        below = path[len(WORKSPACE) :].strip("/") if path.startswith(WORKSPACE) else None
        if below == "":
            return resource(
                "workspace",
                WORKSPACE,
                {"discoveryUrl": f"{REGION}/discovery", "storageAccount": f"/x/{ACCOUNT}", "workspaceId": "1"},
            )
        if path.startswith("/registrymanagement/"):
            return {
                "registryName": "azureml",
                "primaryRegionResourceProviderUri": f"{REGION}/",
                "resourceGroup": "registries",
                "subscriptionId": "microsoft",
            }
        if "/registries/azureml/models/" in path:
            name = path.split("/models/")[1].split("/")[0]
            version = resource(
                "12",
                f"azureml://registries/azureml/models/{name}/versions/12",
                {
                    "modelUri": "azureml://x",
                    "modelType": "mlflow_model",
                    "flavors": {},
                    "isArchived": False,
                    "isAnonymous": False,
                    "properties": {},
                },
            )
            return version if "/versions/12" in path else {"value": [version]}
        if path.startswith("/history/"):
            return self._history(path, body)
        if below is None:
            return None
        if re.fullmatch(r"datastores/workspaceblobstore/listSecrets", below):
            return {"secretsType": "AccountKey", "key": KEY}
        if below.startswith("datastores"):
            found = {
                "datastoreType": "AzureBlob",
                "accountName": ACCOUNT,
                "containerName": CONTAINER,
                "endpoint": "core.windows.net",
                "protocol": "https",
                "isDefault": True,
                "credentials": {"credentialsType": "AccountKey"},
            }
            store = resource("workspaceblobstore", f"{WORKSPACE}/datastores/workspaceblobstore", found)
            return store if "/workspaceblobstore" in below else {"value": [store]}
        if below.lower().endswith("/startpendingupload"):
            name = "/".join(below.split("/")[1:4:2])
            address = f"https://{ACCOUNT}.blob.core.windows.net/{name.replace('/', '-')}"
            return {
                "pendingUploadId": "1",
                "pendingUploadType": "TemporaryBlobReference",
                "blobReferenceForConsumption": {
                    "blobUri": address,
                    "credential": {"credentialType": "SAS", "sasUri": f"{address}?sig=1"},
                    "storageAccountArmId": f"/x/{ACCOUNT}",
                },
            }
        if below.lower().endswith("/listkeys"):
            return {"primaryKey": "first key", "secondaryKey": "second key"}
        if re.fullmatch(r"onlineEndpoints/[^/]+/token", below):
            return {
                "accessToken": "endpoint token",
                "expiryTimeUtc": 2**31,
                "refreshAfterTimeUtc": 2**31,
                "tokenType": "Bearer",
            }
        return None

    def _history(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """What run history knows of jobs; that a job has an output named score is found out by looking for it."""
        if path.endswith("/details"):
            return {"runId": path.split("/")[-2], "status": "Completed", "logFiles": {}}
        if path.endswith("/children"):
            return {"value": [{"runId": "job-1-child", "status": "Completed", "parentRunId": "job-1", "runType": "Command"}]}
        if path.endswith("/rundata"):
            return {"runMetadata": {"runId": body.get("runId"), "status": "Completed", "outputs": {}}}
        return None

    def _resource(self, request: web.Request, below: str, body: dict[str, Any]) -> web.Response:
        key = below.lower()
        if request.method in ("PUT", "PATCH"):
            properties = {**body.get("properties", {}), "provisioningState": "Succeeded"}
            name = below.rpartition("/")[2]
            if re.fullmatch(r"onlineendpoints/[^/]+", key):
                properties["scoringUri"] = "https://stable.stub.inference.ml.azure.com/score"
            if re.fullmatch(r"onlineendpoints/[^/]+/deployments/[^/]+", key):
                properties.setdefault("scaleSettings", {"scaleType": "Default"})
            if re.fullmatch(r"batchendpoints/[^/]+", key):
                properties["scoringUri"] = f"https://stable.stub.inference.ml.azure.com/{name}/jobs"
                properties["defaults"] = properties.get("defaults") or {"deploymentName": None}
            put = {**body, **resource(name, f"{WORKSPACE}/{below}", properties)}
            self.resources[key] = self.put[key] = put
            return web.json_response(put)
        if request.method == "DELETE":
            self.deleted.append(below)
            for other in [other for other in self.resources if other == key or other.startswith(f"{key}/")]:
                del self.resources[other]
            return web.Response(status=200)
        if (found := self.resources.get(key)) is not None:
            return web.json_response(found)
        collection = [one for name, one in self.resources.items() if re.fullmatch(rf"{re.escape(key)}/[^/]+", name)]
        if key.count("/") % 2 == 0:
            return web.json_response({"value": collection})
        return web.json_response({"error": {"code": "ResourceNotFound", "message": below}}, status=404)

    # ---- storage -----------------------------------------------------------------------------------------------------

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        name, query = request.path.strip("/"), request.query
        if request.method == "GET" and query.get("comp") == "list":
            return self._listed(name, query.get("prefix", ""))
        if request.method == "PUT":
            metadata = {key[10:]: value for key, value in request.headers.items() if key.lower().startswith("x-ms-meta-")}
            is_old = query.get("comp") == "metadata"
            content = self.blobs[name][0] if is_old else await request.read()
            self.blobs[name] = content, metadata
            return web.Response(
                status=200 if is_old else 201, headers={"ETag": '"1"', "Last-Modified": "Thu, 26 Nov 2026 12:00:00 GMT"}
            )
        if (found := self.blobs.get(name)) is None:
            return web.Response(status=404, headers={"x-ms-error-code": "BlobNotFound"})
        content, metadata = found
        headers = {f"x-ms-meta-{key}": value for key, value in metadata.items()}
        headers |= {"ETag": '"1"', "Last-Modified": "Thu, 26 Nov 2026 12:00:00 GMT", "x-ms-blob-type": "BlockBlob"}
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(len(content))})
        headers |= {"Content-Range": f"bytes 0-{max(0, len(content) - 1)}/{len(content)}"}
        return web.Response(body=content, status=206, headers=headers)

    def _listed(self, container: str, prefix: str) -> web.Response:
        entries = "".join(
            f"<Blob><Name>{escape(name.removeprefix(container + '/'))}</Name><Properties><BlobType>BlockBlob</BlobType>"
            f"<Content-Length>{len(content)}</Content-Length><Etag>1</Etag></Properties><Metadata/></Blob>"
            for name, (content, _) in self.blobs.items()
            if name.startswith(f"{container}/{prefix}")
        )
        text = f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="{container}"><Blobs>{entries}</Blobs>'
        return web.Response(text=f"{text}<NextMarker/></EnumerationResults>", content_type="application/xml")

    # ---- endpoints at work -------------------------------------------------------------------------------------------

    async def _inference(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/score":
            assert request.headers["Authorization"] == "Bearer first key"
            asked = {"data": await request.read(), "headers": {"Content-Type": "application/json"}}
            async with ClientSession() as session, session.post(self.score_url, **asked) as answer:
                return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
        endpoint = request.path.split("/")[1]
        [given] = (await request.json())["properties"]["inputData"].values()
        name = self.resources[f"batchendpoints/{endpoint}"]["properties"]["defaults"]["deploymentName"]
        deployment = self.resources[f"batchendpoints/{endpoint}/deployments/{name}"]["properties"]
        await asyncio.to_thread(self._run, given["uri"], deployment)
        status = {"status": "Completed", "jobType": "Command", "services": {}, "properties": {}, "tags": {}, "outputs": {}}
        for job in ("job-1", "job-1-child"):
            self.resources[f"jobs/{job}"] = resource(job, f"{WORKSPACE}/jobs/{job}", dict(status))
        return web.json_response(self.resources["jobs/job-1"])

    def _run(self, uri: str, deployment: dict[str, Any]) -> None:
        job = BatchJob(self.folder / "code", self.folder / "source", self.folder / "output", deployment)
        code = self.resources[deployment["codeConfiguration"]["codeId"].partition(WORKSPACE)[2].strip("/").lower()]
        self._fetch(code["properties"]["codeUri"].partition(".net/")[2], job.code)
        self._fetch(f"{CONTAINER}/{uri.partition('/paths/')[2]}", job.source)
        self.run_job(job)
        for path in job.output.rglob("*"):
            if path.is_file():
                self.blobs[f"{CONTAINER}/azureml/job-1-child/score/{path.relative_to(job.output)}"] = path.read_bytes(), {}

    def _fetch(self, prefix: str, folder: Path) -> None:
        prefix = prefix.rstrip("/") + "/"
        for name, (content, _) in self.blobs.items():
            if name.startswith(prefix):
                target = folder / name.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)


def resource(name: str, path: str, properties: dict[str, Any]) -> dict[str, Any]:
    who = {"createdBy": "a user", "createdByType": "User", "createdAt": TIME, "lastModifiedAt": TIME}
    kind = "Microsoft.MachineLearningServices/workspaces"
    return {"id": path, "name": name, "type": kind, "location": "stub", "properties": properties, "systemData": who}


@contextlib.contextmanager
def azure_stub(folder: Path, run_job: Callable[[BatchJob], None], score_url: str) -> Iterator[AzureStub]:
    """A stub in a thread, for a client in another process."""
    authority = trustme.CA()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*HOSTS).configure_cert(tls)
    stub = AzureStub(run_job, score_url, folder, ca_pem=authority.cert_pem.bytes())

    @contextlib.asynccontextmanager
    async def serving() -> AsyncIterator[AzureStub]:
        app = web.Application(client_max_size=1024**3)
        app.router.add_route("*", "/{path:.*}", stub.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        stub.port = runner.addresses[0][1]
        try:
            yield stub
        finally:
            await runner.cleanup()

    with in_a_thread(serving()):
        yield stub
