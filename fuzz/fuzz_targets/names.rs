//! Reads any bytes as questions for names and as answers to them: reading ends in bounded memory, and what the gate itself
//! writes is understood.
#![no_main]
// Of the gate's module the targets use a part.
#![allow(dead_code)]

#[path = "../../crates/sandbox/src/network/gate/message.rs"]
mod message;

use std::net::Ipv4Addr;

use libfuzzer_sys::fuzz_target;
use message::{Code, read_question};
use sealci_fuzz::within;

const BYTES: usize = 1 << 20;

fuzz_target!(|bytes: &[u8]| within(BYTES, || {
    let (first, second) = bytes.split_at(bytes.len() / 2);
    let Some(question) = read_question(first) else { return };
    let (id, answer) =
        second.split_first_chunk::<2>().map_or((0, second), |(id, _)| (u16::from_be_bytes(*id), second));
    let _ = question.read_answer(id, answer);

    let again = read_question(&question.ask(id)).expect("our own question");
    assert_eq!((&again.name, again.kind, again.class), (&question.name, question.kind, question.class));
    let addresses: Vec<Ipv4Addr> = bytes.iter().map(|byte| Ipv4Addr::new(192, 0, 2, *byte)).collect();
    let told = question.answer(Code::Answered, &addresses, 1, 512);
    assert!(told.len() <= 512.max(question.ask(0).len()));
    let own = u16::from_be_bytes([told[0], told[1]]);
    let read = question.read_answer(own, &told).expect("our own answer");
    if (question.kind, question.class) == (message::ADDRESS, message::INTERNET) && !read.is_truncated {
        assert_eq!(read.addresses, addresses);
    }
}));
