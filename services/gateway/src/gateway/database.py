"""The gateway's transactions: short ones, in a few threads beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy.orm import Session, sessionmaker

from parampara.db.session import make_engine, make_sessions, transaction
from parampara.settings import Settings

Result = TypeVar("Result")


class Database:
    def __init__(self, settings: Settings) -> None:
        self._engine = make_engine(settings.database, application="gateway")
        self.sessions: sessionmaker[Session] = make_sessions(self._engine)
        self._threads = ThreadPoolExecutor(max_workers=settings.database.pool_size, thread_name_prefix="database")

    async def run(self, work: Callable[[Session], Result]) -> Result:
        """Run ``work`` in one transaction of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._transact, work)

    def _transact(self, work: Callable[[Session], Result]) -> Result:
        with transaction(self.sessions) as session:
            return work(session)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._engine.dispose()
