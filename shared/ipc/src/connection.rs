//! Typed messages over a byte stream, in two halves that are both safe to cancel.

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::codec::{self, CodecError, Message};
use crate::framing::{FrameDecoder, FrameError};

/// A connection that is of no use any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    #[error("read from the peer")]
    Read(#[source] io::Error),
    #[error("write to the peer")]
    Write(#[source] io::Error),
    #[error("read a frame from the peer")]
    Frame(#[from] FrameError),
    #[error("read a message from the peer")]
    Codec(#[from] CodecError),
    #[error("peer hung up in the middle of a frame, after {pending_bytes} of its bytes")]
    Truncated { pending_bytes: usize },
}

/// Receives messages of type `In`.
#[derive(Debug)]
pub struct MessageReader<R, In> {
    io: R,
    decoder: FrameDecoder,
    received: PhantomData<fn() -> In>,
}

impl<R: AsyncRead + Unpin, In: Message> MessageReader<R, In> {
    /// Reads frames from `io`.
    pub fn new(io: R) -> Self {
        Self { io, decoder: FrameDecoder::default(), received: PhantomData }
    }

    /// The next message, or `None` once the peer has hung up between two frames. Safe to cancel: nothing that has arrived is
    /// lost.
    ///
    /// # Errors
    /// [`ConnectionError`]; the stream is of no use afterwards.
    pub async fn recv(&mut self) -> Result<Option<In>, ConnectionError> {
        loop {
            if let Some(body) = self.decoder.next_frame()? {
                return Ok(Some(codec::decode(&body)?));
            }
            let read = match self.io.read_buf(self.decoder.read_buffer()?).await {
                Ok(read) => read,
                // A peer that was killed with unread data resets the connection; that is a hang-up.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
                Err(error) => return Err(ConnectionError::Read(error)),
            };
            if read == 0 {
                return match self.decoder.pending_bytes() {
                    0 => Ok(None),
                    pending_bytes => Err(ConnectionError::Truncated { pending_bytes }),
                };
            }
        }
    }
}

/// Sends messages of type `Out`, through a queue.
#[derive(Debug)]
pub struct MessageWriter<W, Out> {
    io: W,
    queue: VecDeque<Bytes>,
    sent: PhantomData<fn(Out)>,
}

impl<W: AsyncWrite + Unpin, Out: Message> MessageWriter<W, Out> {
    /// Writes frames to `io`.
    pub fn new(io: W) -> Self {
        Self { io, queue: VecDeque::new(), sent: PhantomData }
    }

    /// Appends a message to the queue; [`MessageWriter::flush`] writes it.
    ///
    /// # Errors
    /// [`ConnectionError::Codec`] if it cannot be encoded; the stream stays good.
    pub fn queue(&mut self, message: &Out) -> Result<(), ConnectionError> {
        self.queue.push_back(codec::encode(message)?);
        Ok(())
    }

    /// Appends bytes that are written as they are: a frame that [`codec::encode`] made, or what a fault leaves of one. None are
    /// written for no bytes.
    pub fn queue_frame(&mut self, frame: Bytes) {
        if !frame.is_empty() {
            self.queue.push_back(frame);
        }
    }

    /// Whether nothing is left to write.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// Writes the queue. Safe to cancel: the next call goes on behind the last byte written.
    ///
    /// # Errors
    /// [`ConnectionError::Write`]; the stream is of no use afterwards.
    pub async fn flush(&mut self) -> Result<(), ConnectionError> {
        while let Some(frame) = self.queue.front_mut() {
            let written = self.io.write(frame).await.map_err(ConnectionError::Write)?;
            if written == 0 {
                return Err(ConnectionError::Write(io::ErrorKind::WriteZero.into()));
            }
            frame.advance(written);
            if frame.is_empty() {
                self.queue.pop_front();
            }
        }
        Ok(())
    }

    /// Queues and writes one message.
    ///
    /// # Errors
    /// As [`MessageWriter::queue`] and [`MessageWriter::flush`].
    pub async fn send(&mut self, message: &Out) -> Result<(), ConnectionError> {
        self.queue(message)?;
        self.flush().await
    }
}

/// Both halves over one local socket: `Out` is sent, `In` received.
#[derive(Debug)]
pub struct Connection<Out, In> {
    /// The receiving half.
    pub reader: MessageReader<OwnedReadHalf, In>,
    /// The sending half; when it is dropped the peer sees the end.
    pub writer: MessageWriter<OwnedWriteHalf, Out>,
}

impl<Out: Message, In: Message> Connection<Out, In> {
    /// A connection over a stream whose peer has been checked.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        Self { reader: MessageReader::new(read), writer: MessageWriter::new(write) }
    }

    /// See [`MessageReader::recv`].
    ///
    /// # Errors
    /// [`ConnectionError`].
    pub async fn recv(&mut self) -> Result<Option<In>, ConnectionError> {
        self.reader.recv().await
    }

    /// See [`MessageWriter::send`].
    ///
    /// # Errors
    /// [`ConnectionError`].
    pub async fn send(&mut self, message: &Out) -> Result<(), ConnectionError> {
        self.writer.send(message).await
    }
}
