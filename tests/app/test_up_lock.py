"""One service a data directory: who only asks whether it is up gets in nobody's way."""

import threading
import time
from pathlib import Path

import pytest

from app.running import AlreadyUp, DataDirLock, running_service
from app.settings import Settings
from app.up import Service


def test_up_waits_for_a_short_holder(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, port=0)
    probe = DataDirLock(settings)
    timer = threading.Timer(0.3, probe.release)
    timer.start()
    service = Service(settings, lambda _: None)
    timer.join()
    assert service.port
    service._socket.close()
    service._lock.release()


def test_a_service_that_stays_is_told_of(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, port=0)
    lock = DataDirLock(settings)
    began = time.monotonic()
    assert running_service(settings) is None  # nothing was written yet
    assert time.monotonic() - began < 0.5
    with pytest.raises(AlreadyUp):
        Service(settings, lambda _: None)
    assert 0.9 < time.monotonic() - began < 5
    lock.release()
