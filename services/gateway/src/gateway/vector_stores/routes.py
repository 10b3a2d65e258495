"""``/v1/vector_stores``: parse, call, answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from gateway.retrieval import SearchPlan, ranking
from gateway.search import Passage
from gateway.vector_stores import files, stores
from gateway.vector_stores.schemas import (
    AttachFile,
    BatchObject,
    ContentPage,
    CreateBatch,
    CreateStore,
    FileStatus,
    ResultsPage,
    SearchResult,
    SearchStore,
    StoreFileObject,
    StoreObject,
    TextContent,
    UpdateFile,
    UpdateStore,
)
from gateway.web import SessionDep, may_read, may_write, services
from parampara.schemas.api import Deleted, Order, Page

router = APIRouter(prefix="/v1/vector_stores", tags=["Vector stores"], dependencies=[Depends(may_read)])
_write = [Depends(may_write)]
_POLL_AFTER_MS = "500"
After = Annotated[str | None, Query(max_length=80)]
Limit = Annotated[int, Query(ge=1, le=100)]


def _cursor(after: After = None, before: After = None, limit: Limit = 20, order: Order = "desc") -> dict[str, Any]:
    return {"after": after, "before": before, "limit": limit, "order": order}


Cursor = Annotated[dict[str, Any], Depends(_cursor)]


@router.post("", dependencies=_write)
def create_store(body: CreateStore, session: SessionDep, request: Request) -> StoreObject:
    """Make a vector store; files given here are ingested at once."""
    model = services(request).settings.embedder.model
    store = stores.create(session, name=body.name or "", embedding_model=model, metadata=body.metadata)
    if body.file_ids:
        attachments = [AttachFile(file_id=file_id, chunking_strategy=body.chunking_strategy) for file_id in body.file_ids]
        files.attach(session, store.id, attachments)
    return stores.shown(session, [store])[0]


@router.get("")
def list_stores(session: SessionDep, cursor: Cursor) -> Page[StoreObject]:
    found, more = stores.listed(session, **cursor)
    return _page(stores.shown(session, found), more)


@router.get("/{vector_store_id}")
def get_store(vector_store_id: str, session: SessionDep, response: Response) -> StoreObject:
    response.headers["openai-poll-after-ms"] = _POLL_AFTER_MS
    return stores.shown(session, [stores.get(session, vector_store_id)])[0]


@router.post("/{vector_store_id}", dependencies=_write)
def update_store(vector_store_id: str, body: UpdateStore, session: SessionDep) -> StoreObject:
    store = stores.get(session, vector_store_id, lock=True)
    if body.name is not None:
        store.name = body.name
    if body.metadata is not None:
        store.extra = dict(body.metadata)
    return stores.shown(session, [store])[0]


@router.delete("/{vector_store_id}", dependencies=_write)
def delete_store(vector_store_id: str, session: SessionDep) -> Deleted:
    """Delete a store and its chunks; refused while an alias answers with it. The files stay."""
    stores.remove(session, vector_store_id)
    return Deleted(id=vector_store_id, object="vector_store.deleted")


@router.post("/{vector_store_id}/search")
async def search_store(vector_store_id: str, body: SearchStore, request: Request) -> ResultsPage:
    """The passages nearest to the query in meaning and in words. Several queries are searched one by one and interleaved."""
    queries = [body.query] if isinstance(body.query, str) else body.query
    plan = SearchPlan((vector_store_id,), body.max_num_results, body.filters, **ranking(body.ranking_options, "ranking_options"))
    found = [await services(request).retriever.find(query, plan) for query in queries]
    return ResultsPage(search_query=queries, data=[_result(passage) for passage in _interleaved(found)[: body.max_num_results]])


@router.post("/{vector_store_id}/files", dependencies=_write)
def attach_file(vector_store_id: str, body: AttachFile, session: SessionDep) -> StoreFileObject:
    """Attach an uploaded file; its status is ``in_progress`` until it is chunked and embedded."""
    files.attach(session, vector_store_id, [body])
    return files.shown(files.get_file(session, vector_store_id, body.file_id))


@router.get("/{vector_store_id}/files")
def list_files(
    vector_store_id: str, session: SessionDep, cursor: Cursor, status: Annotated[FileStatus | None, Query(alias="filter")] = None
) -> Page[StoreFileObject]:
    found, more = files.listed(session, vector_store_id, status=status, **cursor)
    return _page([files.shown(row) for row in found], more)


@router.get("/{vector_store_id}/files/{file_id}")
def get_file(vector_store_id: str, file_id: str, session: SessionDep, response: Response) -> StoreFileObject:
    response.headers["openai-poll-after-ms"] = _POLL_AFTER_MS
    return files.shown(files.get_file(session, vector_store_id, file_id))


@router.post("/{vector_store_id}/files/{file_id}", dependencies=_write)
def update_file(vector_store_id: str, file_id: str, body: UpdateFile, session: SessionDep) -> StoreFileObject:
    row = files.get_file(session, vector_store_id, file_id)
    row.attributes = dict(body.attributes or {})
    session.flush()
    return files.shown(row)


@router.delete("/{vector_store_id}/files/{file_id}", dependencies=_write)
def detach_file(vector_store_id: str, file_id: str, session: SessionDep) -> Deleted:
    files.detach(session, vector_store_id, file_id)
    return Deleted(id=file_id, object="vector_store.file.deleted")


@router.get("/{vector_store_id}/files/{file_id}/content")
def get_content(vector_store_id: str, file_id: str, session: SessionDep) -> ContentPage:
    """The text as it was cut into chunks; neighbours overlap."""
    return ContentPage(data=[TextContent(text=text) for text in files.texts(session, vector_store_id, file_id)])


@router.post("/{vector_store_id}/file_batches", dependencies=_write)
def create_batch(vector_store_id: str, body: CreateBatch, session: SessionDep) -> BatchObject:
    """Attach several files in one job. Files with differing chunk sizes go to jobs of their own; the batch is the first."""
    attachments = body.attachments()
    jobs = files.attach(session, vector_store_id, attachments)
    # nothing new to do (the SDK sent it twice): the batch of the job that has these files
    job_id = jobs[0] if jobs else files.get_file(session, vector_store_id, attachments[0].file_id).job_id or ""
    return files.batch(session, vector_store_id, files.batch_of(job_id))


@router.get("/{vector_store_id}/file_batches/{batch_id}")
def get_batch(vector_store_id: str, batch_id: str, session: SessionDep, response: Response) -> BatchObject:
    response.headers["openai-poll-after-ms"] = _POLL_AFTER_MS
    return files.batch(session, vector_store_id, batch_id)


@router.post("/{vector_store_id}/file_batches/{batch_id}/cancel", dependencies=_write)
def cancel_batch(vector_store_id: str, batch_id: str, session: SessionDep) -> BatchObject:
    return files.cancel_batch(session, vector_store_id, batch_id)


@router.get("/{vector_store_id}/file_batches/{batch_id}/files")
def list_batch_files(
    vector_store_id: str,
    batch_id: str,
    session: SessionDep,
    cursor: Cursor,
    status: Annotated[FileStatus | None, Query(alias="filter")] = None,
) -> Page[StoreFileObject]:
    files.batch(session, vector_store_id, batch_id)
    found, more = files.listed(session, vector_store_id, status=status, job_id=files.job_of(batch_id), **cursor)
    return _page([files.shown(row) for row in found], more)


def _page(data: list[Any], more: bool) -> Page[Any]:
    return Page(data=data, has_more=more, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


def _result(passage: Passage) -> SearchResult:
    return SearchResult(
        file_id=passage.file_id,
        filename=passage.filename,
        score=passage.score,
        attributes=passage.attributes,
        content=[TextContent(text=passage.text)],
        parampara={"chunk_id": passage.chunk_id, "page": passage.page, "position": passage.position},
    )


def _interleaved(lists: list[list[Passage]], key: Callable[[Passage], int] = lambda passage: passage.chunk_id) -> list[Passage]:
    """Best of each list, then second best of each..., every passage once."""
    if len(lists) == 1:
        return lists[0]
    depth = max(map(len, lists), default=0)
    ranked = [found[rank] for rank in range(depth) for found in lists if rank < len(found)]
    return list({key(passage): passage for passage in ranked}.values())
