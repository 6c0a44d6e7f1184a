//! A file on its way to the disk: one thread hashes its bytes, another writes them and hashes the tensors, while the caller
//! makes the next block. The buffers go round, so that memory stays the same.

use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use grail_protocol::ids::WeightsHash;
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use crate::manifest::Sha256Digest;

/// Buffers that go round.
const BUFFERS: usize = 6;

/// What a block belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Header,
    Tensor,
}

type Block = (Vec<u8>, Part);

/// Takes the blocks of the file in order.
#[derive(Debug)]
pub(super) struct Feed {
    empty: Receiver<Vec<u8>>,
    filled: SyncSender<Block>,
}

/// The file could not be written; the error itself is with the thread that met it.
#[derive(Debug)]
pub(super) struct Stopped;

impl Feed {
    /// A buffer with any content.
    pub(super) fn buffer(&self) -> Result<Vec<u8>, Stopped> {
        self.empty.recv().map_err(|_| Stopped)
    }

    pub(super) fn push(&self, block: Vec<u8>, part: Part) -> Result<(), Stopped> {
        self.filled.send((block, part)).map_err(|_| Stopped)
    }
}

/// Hashes of a written file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written {
    pub(super) sha256: Sha256Digest,
    /// Over the tensors alone.
    pub(super) weights: WeightsHash,
}

/// Runs `make`, which pushes the blocks of `file`, and makes the file durable.
///
/// The outer error is that of the file, the inner one that of `make`.
pub(super) fn write<T, E: From<Stopped>>(
    file: &mut File,
    make: impl FnOnce(&Feed) -> Result<T, E>,
) -> io::Result<Result<(T, Written), E>> {
    let (filled, to_hash) = sync_channel(BUFFERS);
    let (hashed, to_write) = sync_channel(BUFFERS);
    let (given_back, empty) = sync_channel(BUFFERS);
    for _ in 0..BUFFERS {
        given_back.send(Vec::new()).map_err(io::Error::other)?;
    }
    let (made, sha256, weights) = std::thread::scope(|scope| {
        let hash = scope.spawn(move || hash_blocks(&to_hash, &hashed));
        let target = &mut *file;
        let write = scope.spawn(move || write_blocks(target, &to_write, &given_back));
        let made = make(&Feed { empty, filled });
        let sha256 = hash.join().expect("hashing does not panic");
        (made, sha256, write.join().expect("writing does not panic"))
    });
    let weights = weights?;
    match made {
        Ok(made) => {
            file.sync_all()?;
            Ok(Ok((made, Written { sha256, weights })))
        }
        Err(error) => Ok(Err(error)),
    }
}

fn hash_blocks(blocks: &Receiver<Block>, next: &SyncSender<Block>) -> Sha256Digest {
    let mut hash = Sha256::new();
    for block in blocks {
        hash.update(&block.0);
        if next.send(block).is_err() {
            break;
        }
    }
    Sha256Digest(hash.finalize().into())
}

fn write_blocks(file: &mut File, blocks: &Receiver<Block>, empty: &SyncSender<Vec<u8>>) -> io::Result<WeightsHash> {
    let mut hash = Xxh3::new();
    for (block, part) in blocks {
        if part == Part::Tensor {
            hash.update(&block);
        }
        file.write_all(&block)?;
        // Refused once the last block was made: the buffer is then not needed any more.
        empty.send(block).ok();
    }
    Ok(WeightsHash(hash.digest128()))
}
