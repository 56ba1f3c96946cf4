//! Reads server-sent events (WHATWG HTML, "Server-sent events") from chunks of bytes.
//!
//! Pure: bytes go in, whole events come out. Comments (a server's keep-alive) are skipped.

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// `message` where the server named none.
    pub kind: String,
    pub data: String,
}

/// The stream sent more for one event than is ever needed.
#[derive(Debug, thiserror::Error)]
#[error("the server sent one event of more than {EVENT_MAX_BYTES} bytes")]
pub struct EventTooLarge;

/// The largest pipeline there can be (512 actions of 1,000 commands) does not come near it.
const EVENT_MAX_BYTES: usize = 64 << 20;

/// The parser's state between chunks.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    after_return: bool,
    kind: String,
    data: String,
    has_data: bool,
}

impl Parser {
    /// Reads the next bytes and returns the events they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Event>, EventTooLarge> {
        let mut events = Vec::new();
        for part in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            let after_return = std::mem::take(&mut self.after_return);
            match part.split_last() {
                Some((b'\n', [])) if after_return => {}
                Some((end @ (b'\n' | b'\r'), head)) => {
                    self.after_return = *end == b'\r';
                    self.line.extend_from_slice(head);
                    let line = std::mem::take(&mut self.line);
                    events.extend(self.end_of_line(&String::from_utf8_lossy(&line)));
                }
                _ => self.line.extend_from_slice(part),
            }
            if self.line.len() + self.data.len() > EVENT_MAX_BYTES {
                return Err(EventTooLarge);
            }
        }
        Ok(events)
    }

    fn end_of_line(&mut self, line: &str) -> Option<Event> {
        if line.is_empty() {
            let kind = std::mem::take(&mut self.kind);
            let data = std::mem::take(&mut self.data);
            return std::mem::take(&mut self.has_data)
                .then(|| Event { kind: if kind.is_empty() { "message".into() } else { kind }, data });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => self.kind = value.to_owned(),
            "data" => {
                if self.has_data {
                    self.data.push('\n');
                }
                self.has_data = true;
                self.data.push_str(value);
            }
            // The data carries the offsets, so ids are not needed; comments have an empty field name.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: &str, data: &str) -> Event {
        Event { kind: kind.into(), data: data.into() }
    }

    #[test]
    fn events_are_read_in_any_chunks() {
        let text = ": hello\nevent: chunk\nid: 7\ndata: {\"a\":1}\n\ndata: one\r\ndata:two\r\n\r\nevent: end\rdata\r\r:x\n\n";
        let expected = vec![event("chunk", "{\"a\":1}"), event("message", "one\ntwo"), event("end", "")];
        for size in 1..text.len() {
            let mut parser = Parser::default();
            let events: Vec<_> = text.as_bytes().chunks(size).flat_map(|c| parser.push(c).unwrap()).collect();
            assert_eq!(events, expected, "in chunks of {size}");
        }
    }

    #[test]
    fn an_event_that_is_cut_off_does_not_appear() {
        assert!(Parser::default().push(b"event: chunk\ndata: {\"a\"").unwrap().is_empty());
        assert!(Parser::default().push(b"event: chunk\n\n").unwrap().is_empty());
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut parser = Parser::default();
        let chunk = vec![b'x'; EVENT_MAX_BYTES / 2 + 1];
        assert!(parser.push(&chunk).is_ok());
        assert!(parser.push(&chunk).is_err());
    }
}
