//! One object into one file: in ranges, several at a time, each going on where it broke, also after the process was killed.
//!
//! Three stages work at the same time: requests bring pieces, one thread writes them and notes which ranges are whole, one
//! thread hashes the file behind it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::time::Instant;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::GetOptions;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::ledger::{Ledger, ObjectVersion};
use super::limits::Retries;
use super::{CheckpointStore, Fetched, Located, StoreError, sink_error};
use crate::blocking::Interest;
use crate::manifest::Sha256Digest;
use crate::progress::{FileMeter, Meter};
use crate::sink::{Coding, Sink, SinkError};

/// Pieces of a download that may wait for the disk.
const QUEUED_PIECES: usize = 32;
/// Bytes read at once while the file is hashed.
const READ_BYTES: usize = 1 << 20;

/// What the requests hand to the writer, in order for each range.
enum Queued {
    Piece { offset: u64, bytes: Bytes },
    RangeEnds(u64),
}

impl CheckpointStore {
    /// Downloads an object into `target`, hashing it on the way, and syncs the file. Memory stays bounded. What breaks is
    /// asked for again; if it fails all the same, `target` keeps what was received, and the next download of the same object
    /// into it goes on from there.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn download(&self, key: &str, target: &Path) -> Result<Fetched, StoreError> {
        self.download_metered(key, target, &Meter::silent().file()).await
    }

    pub(crate) async fn download_metered(
        &self,
        key: &str,
        target: &Path,
        meter: &FileMeter<'_>,
    ) -> Result<Fetched, StoreError> {
        let started = Instant::now();
        let located = self.locate(key).await?.ok_or_else(|| StoreError::NotFound { key: key.to_owned() })?;
        let cap = self.limits.cap(key);
        if located.size > cap {
            return Err(StoreError::TooLarge { key: located.name, cap });
        }
        let fetched = match located.coding {
            Coding::Plain => self.download_ranges(&located, target, meter).await?,
            Coding::Gzip => self.download_compressed(&located, cap, target, meter).await?,
        };
        let seconds = started.elapsed().as_secs_f64();
        tracing::debug!(
            key = located.name,
            bytes = located.size,
            seconds,
            bytes_per_second = located.size as f64 / seconds,
            "Object downloaded."
        );
        Ok(fetched)
    }

    async fn download_ranges(
        &self,
        located: &Located,
        target: &Path,
        meter: &FileMeter<'_>,
    ) -> Result<Fetched, StoreError> {
        let version = ObjectVersion { key: located.name.clone(), size: located.size, e_tag: located.e_tag.clone() };
        let ledger = Ledger::open(target, version, self.limits.range_bytes);
        let write_error = |source| StoreError::write(target, source);
        let file = Arc::new(open_target(target, &ledger, located.size).map_err(write_error)?);
        if !ledger.done().is_empty() {
            tracing::info!(
                key = located.name,
                bytes = ledger.done_bytes(),
                of = located.size,
                "A download that was interrupted goes on."
            );
        }
        meter.add(ledger.done_bytes());
        let missing: Vec<(u64, Range<u64>)> =
            ledger.missing().into_iter().map(|number| (number, ledger.range(number))).collect();
        let spans: Vec<Range<u64>> = (0..ledger.ranges()).map(|number| ledger.range(number)).collect();
        let (written, queue) = blocking::channel();
        let done: Vec<u64> = ledger.done().iter().copied().collect();
        let (hashed, interest) = (file.clone(), Interest::default());
        let _waiting = interest.until_dropped();
        let hasher = tokio::task::spawn_blocking(move || {
            hash_in_order(&hashed, &spans, done.into_iter().chain(queue), &interest)
        });
        let (pieces, queue) = mpsc::channel(QUEUED_PIECES);
        let writer = tokio::task::spawn_blocking(move || write_pieces(&file, ledger, queue, &written));

        let fetches =
            missing.into_iter().map(|(number, range)| self.fetch_range(located, number, range, &pieces, meter));
        let fetched: Result<(), StoreError> =
            stream::iter(fetches).buffer_unordered(self.limits.parallel_ranges.max(1)).try_collect().await;
        drop(pieces);
        // Also after a failure: nothing may write to the file once this returns, and the writer's own error says more.
        let ledger = writer.await.unwrap_or_else(|panic| Err(io::Error::other(panic))).map_err(write_error)?;
        let digest = hasher.await.unwrap_or_else(|panic| Err(io::Error::other(panic))).map_err(write_error)?;
        fetched?;
        ledger.close().map_err(write_error)?;
        Ok(Fetched { bytes: located.size, sha256: digest })
    }

    async fn fetch_range(
        &self,
        located: &Located,
        number: u64,
        range: Range<u64>,
        pieces: &mpsc::Sender<Queued>,
        meter: &FileMeter<'_>,
    ) -> Result<(), StoreError> {
        let mut retries = Retries::new(&self.limits.retry);
        let mut next = range.start;
        while next < range.end {
            let begun = next;
            if let Err(error) = self.fetch_body(located, &mut next, range.end, pieces, meter).await {
                if next > begun {
                    retries.progressed();
                }
                retries.after(error).await?;
            }
        }
        send(located, pieces, Queued::RangeEnds(number)).await
    }

    /// One request for the bytes `next` to `end`; `next` moves with what was received.
    async fn fetch_body(
        &self,
        located: &Located,
        next: &mut u64,
        end: u64,
        pieces: &mpsc::Sender<Queued>,
        meter: &FileMeter<'_>,
    ) -> Result<(), StoreError> {
        let key = &located.name;
        let options = GetOptions::new().with_range(Some(*next..end)).with_if_match(located.e_tag.clone());
        let answer = self.in_time(key, self.store.get_opts(&located.path, options)).await?;
        let answer = answer.map_err(|source| self.read_error(key, source))?;
        if answer.meta.size != located.size || answer.range != (*next..end) {
            return Err(StoreError::Changed { key: key.clone() });
        }
        let begun = *next;
        let mut body = answer.into_stream();
        while *next < end {
            let mut bytes = match self.in_time(key, body.next()).await? {
                Some(piece) => piece.map_err(|source| self.read_error(key, source))?,
                None => {
                    let (received, expected) = (*next - begun, end - begun);
                    return Err(StoreError::Truncated { key: key.clone(), received, expected });
                }
            };
            bytes.truncate(usize::try_from(end - *next).unwrap_or(usize::MAX));
            let (offset, length) = (*next, bytes.len() as u64);
            send(located, pieces, Queued::Piece { offset, bytes }).await?;
            *next += length;
            meter.add(length);
        }
        Ok(())
    }

    /// A compressed twin is small and cannot be entered in the middle: it is read from its start each time.
    async fn download_compressed(
        &self,
        located: &Located,
        cap: u64,
        target: &Path,
        meter: &FileMeter<'_>,
    ) -> Result<Fetched, StoreError> {
        let mut retries = Retries::new(&self.limits.retry);
        loop {
            match self.expand_once(located, cap, target).await {
                Ok(fetched) => {
                    meter.add(located.size);
                    return Ok(fetched);
                }
                Err(error) => retries.after(error).await?,
            }
        }
    }

    async fn expand_once(&self, located: &Located, cap: u64, target: &Path) -> Result<Fetched, StoreError> {
        let mut body = self.open(located, cap).await?;
        let (pieces, queue) = mpsc::channel(QUEUED_PIECES);
        let path = target.to_path_buf();
        let writer = tokio::task::spawn_blocking(move || write_expanded(&path, cap, queue));
        let mut received = Ok(());
        loop {
            match self.next_piece(&located.name, &mut body).await {
                Ok(Some(piece)) => {
                    // The writer hung up: its own error says why.
                    if pieces.send(piece).await.is_err() {
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    received = Err(error);
                    break;
                }
            }
        }
        drop(pieces);
        let written = writer.await.map_err(|panic| StoreError::write(target, io::Error::other(panic)))?;
        received?;
        written.map_err(|error| sink_error(&located.name, cap, target, error))
    }
}

/// Hands a piece to the writer. If it has hung up, its own error comes before the one returned here.
async fn send(located: &Located, pieces: &mpsc::Sender<Queued>, queued: Queued) -> Result<(), StoreError> {
    let gone = |_| StoreError::write(Path::new(&located.name), io::Error::other("its writer has ended"));
    pieces.send(queued).await.map_err(gone)
}

fn open_target(target: &Path, ledger: &Ledger, size: u64) -> io::Result<File> {
    let fresh = ledger.done().is_empty();
    let file = File::options().read(true).write(true).create(true).truncate(fresh).open(target)?;
    // A file in several ranges has its final length from the start, by which a ledger recognises it.
    if ledger.ranges() > 1 {
        file.set_len(size)?;
    }
    Ok(file)
}

fn write_pieces(
    file: &File,
    mut ledger: Ledger,
    mut queue: mpsc::Receiver<Queued>,
    written: &blocking::Sender<u64>,
) -> io::Result<Ledger> {
    while let Some(queued) = queue.blocking_recv() {
        match queued {
            Queued::Piece { offset, bytes } => file.write_all_at(&bytes, offset)?,
            Queued::RangeEnds(number) => {
                ledger.mark(number)?;
                // A hasher that is gone has an error of its own.
                if written.send(number).is_err() {
                    break;
                }
            }
        }
    }
    Ok(ledger)
}

/// Hashes ranges in their order as they are written, and syncs the file once all of them are. After fewer, the digest is of
/// the part before the first gap and of no use.
fn hash_in_order(
    file: &File,
    spans: &[Range<u64>],
    written: impl Iterator<Item = u64>,
    interest: &Interest,
) -> io::Result<Sha256Digest> {
    let mut hash = Sha256::new();
    let mut here = vec![false; spans.len()];
    let mut next = 0;
    let mut buffer = vec![0; READ_BYTES];
    for number in written {
        if let Some(slot) = usize::try_from(number).ok().and_then(|number| here.get_mut(number)) {
            *slot = true;
        }
        while here.get(next).is_some_and(|here| *here) {
            let Range { mut start, end } = spans[next].clone();
            while start < end {
                interest.check()?;
                let wanted = usize::try_from(end - start).unwrap_or(READ_BYTES).min(READ_BYTES);
                file.read_exact_at(&mut buffer[..wanted], start)?;
                hash.update(&buffer[..wanted]);
                start += wanted as u64;
            }
            next += 1;
        }
    }
    if next == spans.len() {
        file.sync_all()?;
    }
    Ok(Sha256Digest(hash.finalize().into()))
}

fn write_expanded(path: &Path, cap: u64, mut queue: mpsc::Receiver<Bytes>) -> Result<Fetched, SinkError> {
    let file = File::options().write(true).create(true).truncate(true).open(path).map_err(SinkError::Target)?;
    let mut sink = Sink::new(file, Coding::Gzip, cap);
    while let Some(piece) = queue.blocking_recv() {
        sink.take(&piece)?;
    }
    let (file, fetched) = sink.finish()?;
    file.sync_all().map_err(SinkError::Target)?;
    Ok(fetched)
}
