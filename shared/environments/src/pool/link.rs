//! The pipes to one interpreter.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use super::protocol::{Hello, MOST_REPLY_BYTES, Reply, Request, Start};

/// What is wrong with an interpreter's pipes, or with what comes through them.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("it has no pipes")]
    NoPipes,
    #[error("its pipes")]
    Io(#[from] std::io::Error),
    #[error("its answer is no JSON of ours")]
    Json(#[from] serde_json::Error),
    #[error("its answer has {bytes} bytes")]
    TooLong { bytes: usize },
    #[error("it answered request {answered} instead of {asked}")]
    OutOfOrder { asked: u64, answered: u64 },
}

/// A connection to an interpreter that is ready.
#[derive(Debug)]
pub struct Link {
    input: pipe::Sender,
    output: pipe::Receiver,
    asked: u64,
    /// Memory that it had when it was ready.
    first_rss_kib: u64,
}

impl Link {
    /// Tells the interpreter how to work and hears what it is.
    pub(super) async fn open(
        input: pipe::Sender,
        output: pipe::Receiver,
        start: &Start,
    ) -> Result<(Self, Hello), LinkError> {
        let mut link = Self { input, output, asked: 0, first_rss_kib: 0 };
        link.send(start).await?;
        let hello: Hello = link.receive().await?;
        link.first_rss_kib = hello.rss_kib;
        Ok((link, hello))
    }

    /// Sends `request` under the next number and waits for its answer.
    pub(super) async fn exchange(&mut self, mut request: Request<'_>) -> Result<Reply, LinkError> {
        self.asked += 1;
        request.id = self.asked;
        self.send(&request).await?;
        let reply: Reply = self.receive().await?;
        if reply.id != self.asked {
            return Err(LinkError::OutOfOrder { asked: self.asked, answered: reply.id });
        }
        Ok(reply)
    }

    /// How much more memory the interpreter has than at its start.
    pub(super) fn grown_kib(&self, reply: &Reply) -> u64 {
        reply.rss_kib.saturating_sub(self.first_rss_kib)
    }

    async fn send(&mut self, message: &impl Serialize) -> Result<(), LinkError> {
        let mut frame = vec![0; 4];
        serde_json::to_writer(&mut frame, message)?;
        let length = u32::try_from(frame.len() - 4).map_err(|_| LinkError::TooLong { bytes: frame.len() })?;
        frame[..4].copy_from_slice(&length.to_le_bytes());
        Ok(self.input.write_all(&frame).await?)
    }

    async fn receive<M: DeserializeOwned>(&mut self) -> Result<M, LinkError> {
        let bytes = usize::try_from(self.output.read_u32_le().await?).unwrap_or(usize::MAX);
        if bytes > MOST_REPLY_BYTES {
            return Err(LinkError::TooLong { bytes });
        }
        let mut body = vec![0; bytes];
        self.output.read_exact(&mut body).await?;
        Ok(serde_json::from_slice(&body)?)
    }
}
