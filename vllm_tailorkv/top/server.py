"""The server that is watched: its `/metrics`, or one line on what is wrong with it."""

import ipaddress
import time
from typing import Self

import httpx

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.top.figures import PLAN, RUNNING
from vllm_tailorkv.top.scrape import Scrape, parse

_TIMEOUT_SECONDS = 5.0


class MetricsServer:
    """A vLLM server at a URL, to be used in a `with` statement.

    Args:
        url: its root, with or without `http://` and what follows the port.

    Raises:
        TailorKVError: that is no URL.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = httpx.URL(url if "://" in url else f"http://{url}")
        except httpx.InvalidURL as error:
            raise TailorKVError(f"{url!r} is no URL: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise TailorKVError(f"{url!r} is no URL of a server; an example: localhost:8000")
        self.url = str(parsed.copy_with(raw_path=b"/metrics"))
        # A proxy knows nothing of this machine's own ports.
        self._client = httpx.Client(
            timeout=_TIMEOUT_SECONDS, trust_env=not _is_loopback(parsed.host)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def read(self) -> Scrape:
        """What it says now.

        Raises:
            TailorKVError: it does not answer, is no vLLM, or serves without tailorkv.
        """
        try:
            response = self._client.get(self.url)
        except httpx.TimeoutException:
            raise TailorKVError(
                f"{self.url} did not answer within {_TIMEOUT_SECONDS:.0f} s"
            ) from None
        except httpx.HTTPError as error:
            raise TailorKVError(f"no server answers at {self.url}: {error}") from None
        now = time.monotonic()
        if not response.is_success:
            raise TailorKVError(f"{self.url} answers with status {response.status_code}")
        try:
            scrape = parse(response.text, now)
        except ValueError:
            raise TailorKVError(f"{self.url} tells no metrics") from None
        if not scrape.labels(PLAN):
            if scrape.labels(RUNNING):
                raise TailorKVError(
                    f"the vLLM at {self.url} serves without tailorkv; start it with "
                    "--attention-backend tailorkv"
                )
            raise TailorKVError(f"{self.url} tells no metrics of vLLM's")
        return scrape


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
