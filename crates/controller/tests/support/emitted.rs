//! What an action writes, and how it must read: the oracle of the tests of logs.

use rand::rngs::StdRng;
use rand::{Rng, RngCore};

/// A part of a log.
#[derive(Debug, Clone)]
pub enum Part {
    Bytes(Vec<u8>),
    Gap(u64),
}

/// What an action wrote, and what of it was not kept.
#[derive(Debug, Clone)]
pub struct Emitted(pub Vec<(u64, Part)>);

impl Emitted {
    pub fn of(parts: Vec<Part>) -> Self {
        let mut at = 0;
        let with_offset = |part: Part| {
            let offset = at;
            at += match &part {
                Part::Bytes(bytes) => bytes.len() as u64,
                Part::Gap(length) => *length,
            };
            (offset, part)
        };
        Self(parts.into_iter().map(with_offset).collect())
    }

    /// Text and binary bytes in chunks of any size, and gaps between some of them.
    pub fn random(random: &mut StdRng, chunks: usize, largest: usize) -> Self {
        let part = |_| {
            let length = random.random_range(1..=largest);
            let mut bytes = vec![0; length];
            match random.random_range(0..4) {
                0 => return Part::Gap(random.random_range(1..100_000)),
                1 => random.fill_bytes(&mut bytes),
                _ => bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = b"a line\n\0\xff"[at % 9]),
            }
            Part::Bytes(bytes)
        };
        Self::of((0..chunks).map(part).collect())
    }

    pub fn noise(random: &mut StdRng, length: usize) -> Self {
        let mut bytes = vec![0; length];
        random.fill_bytes(&mut bytes);
        Self::of(bytes.chunks(700_001).map(|some| Part::Bytes(some.to_vec())).collect())
    }

    pub fn length(&self) -> u64 {
        self.0.last().map_or(0, |(offset, part)| match part {
            Part::Bytes(bytes) => offset + bytes.len() as u64,
            Part::Gap(length) => offset + length,
        })
    }

    /// The plain view.
    pub fn plain(&self) -> Vec<u8> {
        let one = |(_, part): &(u64, Part)| match part {
            Part::Bytes(bytes) => bytes.clone(),
            Part::Gap(length) => {
                format!("\n[SealCI: {length} bytes of this log were not kept: spool full]\n").into_bytes()
            }
        };
        self.0.iter().flat_map(one).collect()
    }

    /// What a range must be answered with: its bytes, up to the next gap; none within a gap.
    pub fn range(&self, from: u64, to: u64) -> Option<Vec<u8>> {
        let mut found = Vec::new();
        for (offset, part) in &self.0 {
            match part {
                Part::Gap(length) if from < offset + length && to > *offset => {
                    return if from >= *offset { None } else { Some(found) };
                }
                Part::Gap(_) => {}
                Part::Bytes(bytes) => {
                    let cut = |at: u64| (at.saturating_sub(*offset) as usize).min(bytes.len());
                    found.extend_from_slice(&bytes[cut(from)..cut(to).max(cut(from))]);
                }
            }
        }
        Some(found)
    }

    /// What the events of a follower hold together: the bytes, and the gaps as they are.
    pub fn followed(&self) -> (Vec<u8>, Vec<(u64, u64)>) {
        let (mut bytes, mut gaps) = (Vec::new(), Vec::new());
        for (offset, part) in &self.0 {
            match part {
                Part::Bytes(some) => bytes.extend_from_slice(some),
                Part::Gap(length) => gaps.push((*offset, offset + length)),
            }
        }
        (bytes, gaps)
    }
}
