//! Makes and reads tickets: what lets one attempt, and nobody else, keep and read things here.
//!
//! ```text
//! ticket   "sealci_ticket_" base64url(token ‖ mac), without padding
//! token    the attempt's fencing token, 8 bytes, big-endian
//! mac      HMAC-SHA256(key, "sealci ticket 1" ‖ action id (16 bytes) ‖ attempt's number (4, big-endian) ‖ token)
//! ```
//!
//! A ticket that reads well proves that it was made for the attempt under that token. Whether the attempt still owns its
//! action is a question for the database.

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sealci_core::ids::{AttemptId, FencingToken};

/// What every ticket begins with, so that secret scanners can know one.
const PREFIX: &str = "sealci_ticket_";
/// Separates these from other uses of the key.
const CONTEXT: &[u8] = b"sealci ticket 1";
const TOKEN_BYTES: usize = 8;
pub const KEY_BYTES: usize = 32;

/// Makes tickets, and knows its own again. `Debug` does not show the key.
#[derive(Clone)]
pub struct TicketKey([u8; KEY_BYTES]);

impl std::fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TicketKey(***)")
    }
}

impl TicketKey {
    pub fn new(key: [u8; KEY_BYTES]) -> Self {
        Self(key)
    }

    /// The attempt's ticket; always the same one.
    pub fn ticket(&self, attempt: AttemptId, token: FencingToken) -> String {
        let mut bytes = token.0.to_be_bytes().to_vec();
        bytes.extend_from_slice(hmac::sign(&self.key(), &said(attempt, token)).as_ref());
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    /// The fencing token under which this was made for this attempt; none if it was not.
    pub fn read(&self, attempt: AttemptId, ticket: &str) -> Option<FencingToken> {
        let bytes = URL_SAFE_NO_PAD.decode(ticket.strip_prefix(PREFIX)?).ok()?;
        let (token, mac) = bytes.split_at_checked(TOKEN_BYTES)?;
        let token = FencingToken(u64::from_be_bytes(token.try_into().ok()?));
        hmac::verify(&self.key(), &said(attempt, token), mac).ok()?;
        Some(token)
    }

    fn key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.0)
    }
}

fn said(attempt: AttemptId, token: FencingToken) -> Vec<u8> {
    let number = attempt.number.to_be_bytes();
    [CONTEXT, attempt.action.as_uuid().as_bytes(), &number, &token.0.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealci_core::ids::ActionId;
    use uuid::Uuid;

    #[test]
    fn a_ticket_opens_its_own_attempt_only() {
        let key = TicketKey::new([7; KEY_BYTES]);
        let attempt = AttemptId { action: ActionId::from_uuid(Uuid::now_v7()), number: 2 };
        let ticket = key.ticket(attempt, FencingToken(99));
        assert_eq!(key.ticket(attempt, FencingToken(99)), ticket);
        assert_eq!(key.read(attempt, &ticket), Some(FencingToken(99)));
        assert_eq!(TicketKey::new([8; KEY_BYTES]).read(attempt, &ticket), None);
        assert_eq!(key.read(AttemptId { number: 1, ..attempt }, &ticket), None);
        let other = AttemptId { action: ActionId::from_uuid(Uuid::now_v7()), number: 2 };
        assert_eq!(key.read(other, &ticket), None);
        for index in 0..ticket.len() {
            let mut forged = ticket.clone().into_bytes();
            forged[index] = if forged[index] == b'A' { b'B' } else { b'A' };
            assert_eq!(key.read(attempt, &String::from_utf8(forged).unwrap()), None, "byte {index}");
            assert_eq!(key.read(attempt, &ticket[..index]), None, "{index} bytes");
        }
        assert!(!format!("{key:?}").contains('7'));
    }
}
