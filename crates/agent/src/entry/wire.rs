//! Encodes what goes over the socket: frames of a kind, a length (u32 LE) and that many bytes.
//!
//! ```text
//! person   Ask  Input*
//! agent    Running | Refused | Begun  (Output | Room)*  Ended
//! ```
//!
//! Of input at most [`INPUT_WINDOW`] pieces may be sent at first, and one more for each `Room`.

use std::io;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest frame.
const MAX_BYTES: usize = 1 << 20;
/// The longest piece of input.
pub const MAX_INPUT_BYTES: usize = crate::executor::door::Talk::MAX_INPUT_BYTES;
/// How many pieces of input may be on their way.
pub const INPUT_WINDOW: usize = 4;

/// What a person wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// To know what runs.
    List,
    /// To run a program in it.
    Exec {
        attempt: String,
        /// None: the action itself.
        service: Option<String>,
        program: Vec<String>,
    },
}

/// An action that can be entered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningAction {
    pub attempt: String,
    pub action: String,
    pub pipeline: String,
    pub services: Vec<String>,
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    Exited(i32),
    /// The action was over first, or something broke; for a person.
    BrokeOff(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Ask(Ask),
    /// An empty one is its end.
    Input(Bytes),
    Running(Vec<RunningAction>),
    /// For a person.
    Refused(String),
    Begun,
    Output {
        is_error: bool,
        bytes: Bytes,
    },
    /// For one more piece of input.
    Room,
    Ended(Ending),
}

/// Reads one; none at the end. Dropping the future loses what was read of it.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let kind = match stream.read_u8().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        kind => kind?,
    };
    let length = stream.read_u32_le().await? as usize;
    if length > MAX_BYTES {
        return Err(garbled());
    }
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await?;
    Ok(Some(match kind {
        b'a' => Frame::Ask(from_json(&payload)?),
        b'i' => Frame::Input(payload.into()),
        b'l' => Frame::Running(from_json(&payload)?),
        b'r' => Frame::Refused(from_json(&payload)?),
        b'b' => Frame::Begun,
        b'o' => Frame::Output { is_error: false, bytes: payload.into() },
        b'e' => Frame::Output { is_error: true, bytes: payload.into() },
        b'm' => Frame::Room,
        b'z' => Frame::Ended(from_json(&payload)?),
        _ => return Err(garbled()),
    }))
}

/// Writes one.
pub async fn write(stream: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    let (kind, payload) = match frame {
        Frame::Ask(ask) => (b'a', to_json(ask)?),
        Frame::Input(bytes) => (b'i', bytes.clone()),
        Frame::Running(running) => (b'l', to_json(running)?),
        Frame::Refused(why) => (b'r', to_json(why)?),
        Frame::Begun => (b'b', Bytes::new()),
        Frame::Output { is_error: false, bytes } => (b'o', bytes.clone()),
        Frame::Output { is_error: true, bytes } => (b'e', bytes.clone()),
        Frame::Room => (b'm', Bytes::new()),
        Frame::Ended(ending) => (b'z', to_json(ending)?),
    };
    let length = u32::try_from(payload.len()).ok().filter(|length| *length as usize <= MAX_BYTES);
    let length =
        length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the request is too long"))?;
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind);
    frame.extend(length.to_le_bytes());
    frame.extend_from_slice(&payload);
    stream.write_all(&frame).await
}

fn to_json(value: &impl Serialize) -> io::Result<Bytes> {
    Ok(serde_json::to_vec(value)?.into())
}

fn from_json<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|_| garbled())
}

fn garbled() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the other end may be of another release: it is not understood",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read() {
        let exec = Ask::Exec { attempt: "a.1".into(), service: None, program: vec!["x y".into()] };
        let running = RunningAction {
            attempt: "a.1".into(),
            action: "a".into(),
            pipeline: "p".into(),
            services: vec!["s".into()],
        };
        let frames = [
            Frame::Ask(Ask::List),
            Frame::Ask(exec),
            Frame::Input(Bytes::new()),
            Frame::Running(vec![running]),
            Frame::Refused("no".into()),
            Frame::Begun,
            Frame::Output { is_error: false, bytes: vec![0; 100].into() },
            Frame::Output { is_error: true, bytes: "x".into() },
            Frame::Room,
            Frame::Ended(Ending::Exited(-1)),
            Frame::Ended(Ending::BrokeOff("over".into())),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            write(&mut bytes, frame).await.unwrap();
        }
        let mut rest = &bytes[..];
        for frame in frames {
            assert_eq!(read(&mut rest).await.unwrap(), Some(frame));
        }
        assert_eq!(read(&mut rest).await.unwrap(), None);
        assert!(read(&mut &b"x\0\0\0\0"[..]).await.is_err());
        assert!(read(&mut &b"i\xff\xff\xff\xff"[..]).await.is_err());
        assert!(write(&mut Vec::new(), &Frame::Input(vec![0; MAX_BYTES + 1].into())).await.is_err());
    }
}
