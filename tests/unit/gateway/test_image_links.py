"""Images behind an address: as many as fit, for their time, under names that cannot be guessed."""

from __future__ import annotations

from starlette.requests import Request

from mii_serve.gateway.image_links import PATH, STORED_S, ImageStore, base_url


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def request(name: str = "", **headers: str) -> Request:
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    scope = {"type": "http", "scheme": "http", "path": "/", "headers": raw, "server": ("127.0.0.1", 5001), "query_string": b""}
    return Request({**scope, "path_params": {"name": name}})


async def status(store: ImageStore, path: str) -> int:
    return (await store.answer(request(path.removeprefix(f"{PATH}/")))).status_code


async def test_a_picture_is_there_for_its_time():
    clock = Clock()
    store = ImageStore(clock=clock)
    path = store.add(b"1234", "png")
    clock.now += STORED_S - 1
    answer = await store.answer(request(path.removeprefix(f"{PATH}/")))
    assert (answer.status_code, answer.body, answer.headers["content-type"]) == (200, b"1234", "image/png")
    assert answer.headers["x-content-type-options"] == "nosniff"
    clock.now += 1
    assert await status(store, path) == 404 and store.num_bytes == 0


async def test_the_oldest_go_where_there_is_no_room():
    store = ImageStore(max_bytes=10)
    first, second, third = (store.add(b"x" * 4, "png") for _ in range(3))
    assert [await status(store, path) for path in (first, second, third)] == [404, 200, 200]
    assert store.num_bytes == 8
    too_large = store.add(b"x" * 11, "png")
    assert await status(store, too_large) == 404 and store.num_bytes == 0


def test_names_are_long_and_never_the_same():
    store = ImageStore()
    names = {store.add(b"", "png").removeprefix(f"{PATH}/") for _ in range(100)}
    assert len(names) == 100 and all(len(name) >= 43 for name in names)


def test_a_link_begins_with_what_the_caller_knows_the_server_by():
    assert base_url(request(host="pictures.example:8443"), None) == "http://pictures.example:8443"
    assert base_url(request(), None) == "http://127.0.0.1:5001"
    assert base_url(request(host="inside"), "https://pictures.example/sd/") == "https://pictures.example/sd"
