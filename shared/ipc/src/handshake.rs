//! Hello and Welcome: who is there, with which protocol, which incarnation and which token.

use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;

use crate::codec::Message;
use crate::connection::{Connection, ConnectionError};
use crate::messages::{
    Epoch, FromLauncher, FromWorker, Hello, PROTOCOL_VERSION, SlotId, ToLauncher, ToWorker, Welcome,
};
use crate::socket::{self, SocketError};
use crate::token::Token;

/// A peer with which no work is done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("shake hands: no {awaited} within {limit:?}")]
    Deadline { awaited: &'static str, limit: Duration },
    #[error("shake hands: peer hung up before its {awaited}")]
    HungUp { awaited: &'static str },
    #[error("shake hands: peer sent something else instead of its {awaited}")]
    Unexpected { awaited: &'static str },
    #[error("shake hands: peer speaks protocol {theirs} (build {build}), this build speaks {ours}")]
    Version { ours: u32, theirs: u32, build: String },
    #[error("shake hands: peer does not show the token of slot {slot}")]
    Token { slot: SlotId },
    #[error("shake hands: peer is slot {found}, slot {expected} was started")]
    Slot { found: SlotId, expected: SlotId },
    #[error("shake hands: peer is incarnation {found}, {expected} was started")]
    Epoch { found: Epoch, expected: Epoch },
    #[error("shake hands")]
    Connection(#[from] ConnectionError),
}

/// What a child says first.
pub trait ChildMessage: Message {
    /// The message of a [`Hello`].
    fn hello(hello: Hello) -> Self;
    /// The [`Hello`] in this message.
    fn into_hello(self) -> Option<Hello>;
}

/// What a supervisor says first.
pub trait ParentMessage: Message {
    /// The message of a [`Welcome`].
    fn welcome(welcome: Welcome) -> Self;
    /// The [`Welcome`] in this message.
    fn into_welcome(self) -> Option<Welcome>;
}

macro_rules! greetings {
    ($child:ident, $parent:ident) => {
        impl ChildMessage for $child {
            fn hello(hello: Hello) -> Self {
                Self::Hello(hello)
            }
            fn into_hello(self) -> Option<Hello> {
                if let Self::Hello(hello) = self { Some(hello) } else { None }
            }
        }
        impl ParentMessage for $parent {
            fn welcome(welcome: Welcome) -> Self {
                Self::Welcome(welcome)
            }
            fn into_welcome(self) -> Option<Welcome> {
                if let Self::Welcome(welcome) = self { Some(welcome) } else { None }
            }
        }
    };
}
greetings!(FromWorker, ToWorker);
greetings!(FromLauncher, ToLauncher);

/// Who the supervisor expects; an unset field is not checked (a worker that stands alone).
#[derive(Debug, Clone, Default)]
pub struct Expected {
    pub slot: Option<SlotId>,
    pub epoch: Option<Epoch>,
    pub token: Option<Token>,
}

impl Expected {
    /// The child that was started for `slot` with `epoch` and `token`.
    #[must_use]
    pub fn child(slot: SlotId, epoch: Epoch, token: Token) -> Self {
        Self { slot: Some(slot), epoch: Some(epoch), token: Some(token) }
    }

    /// Checks a [`Hello`]; the version first, since the rest may mean something else in another one.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn check(&self, hello: &Hello) -> Result<(), HandshakeError> {
        check_version(hello.protocol, &hello.build)?;
        if let Some(token) = &self.token
            && !token.matches(&hello.token)
        {
            return Err(HandshakeError::Token { slot: self.slot.unwrap_or(hello.slot) });
        }
        if let Some(expected) = self.slot
            && hello.slot != expected
        {
            return Err(HandshakeError::Slot { found: hello.slot, expected });
        }
        if let Some(expected) = self.epoch
            && hello.epoch != expected
        {
            return Err(HandshakeError::Epoch { found: hello.epoch, expected });
        }
        Ok(())
    }
}

fn check_version(theirs: u32, build: &str) -> Result<(), HandshakeError> {
    if theirs == PROTOCOL_VERSION {
        return Ok(());
    }
    Err(HandshakeError::Version { ours: PROTOCOL_VERSION, theirs, build: build.to_owned() })
}

/// Connects to a child, receives its [`Hello`], checks it and answers, all within `limit`.
///
/// A child listens as soon as it runs and says Hello when it is ready, so this is its readiness, too: `limit` must leave room
/// for loading a model. Whoever also watches the process races the two.
///
/// # Errors
/// [`HandshakeError`].
pub async fn connect<Out: ParentMessage, In: ChildMessage>(
    path: &Path,
    expected: &Expected,
    limit: Duration,
) -> Result<(Connection<Out, In>, Hello), HandshakeError> {
    let greeting = async {
        let stream = socket::connect(path, limit).await?;
        let mut connection = Connection::<Out, In>::new(stream);
        let hello = first(&mut connection, "hello").await?.into_hello();
        let hello = hello.ok_or(HandshakeError::Unexpected { awaited: "hello" })?;
        expected.check(&hello)?;
        let build = env!("CARGO_PKG_VERSION").to_owned();
        let welcome = Welcome { protocol: PROTOCOL_VERSION, build, epoch: hello.epoch };
        connection.send(&Out::welcome(welcome)).await?;
        Ok((connection, hello))
    };
    within(limit, "hello", greeting).await
}

/// The listening side: says `hello` on an accepted stream and receives the [`Welcome`] within `limit`.
///
/// # Errors
/// [`HandshakeError`]; the caller may accept the next peer then.
pub async fn greet<Out: ChildMessage, In: ParentMessage>(
    stream: UnixStream,
    hello: Hello,
    limit: Duration,
) -> Result<(Connection<Out, In>, Welcome), HandshakeError> {
    let greeting = async {
        let mut connection = Connection::<Out, In>::new(stream);
        let epoch = hello.epoch;
        connection.send(&Out::hello(hello)).await?;
        let welcome = first(&mut connection, "welcome").await?.into_welcome();
        let welcome = welcome.ok_or(HandshakeError::Unexpected { awaited: "welcome" })?;
        check_version(welcome.protocol, &welcome.build)?;
        if welcome.epoch != epoch {
            return Err(HandshakeError::Epoch { found: welcome.epoch, expected: epoch });
        }
        Ok((connection, welcome))
    };
    within(limit, "welcome", greeting).await
}

async fn first<Out: Message, In: Message>(
    connection: &mut Connection<Out, In>,
    awaited: &'static str,
) -> Result<In, HandshakeError> {
    connection.recv().await?.ok_or(HandshakeError::HungUp { awaited })
}

async fn within<T>(
    limit: Duration,
    awaited: &'static str,
    greeting: impl Future<Output = Result<T, HandshakeError>>,
) -> Result<T, HandshakeError> {
    tokio::time::timeout(limit, greeting).await.unwrap_or(Err(HandshakeError::Deadline { awaited, limit }))
}
