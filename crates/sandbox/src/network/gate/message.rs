//! Reads and writes the messages in which names are asked for (RFC 1035, section 4).
//!
//! Of questions the one that there is, of answers the addresses to which a name leads, by aliases or not; all else is left
//! out. Invariants: whatever the bytes are, reading them ends, after work in proportion to them; what is written never
//! repeats more of a stranger's message than the question.

use std::net::Ipv4Addr;

const HEADER_BYTES: usize = 12;
/// Of a name as it stands in a message, its end included.
const MAX_NAME_BYTES: usize = 255;
/// A name that leads from place to place in a message more often leads nowhere.
const MAX_JUMPS: usize = 32;
/// Aliases of aliases.
const MAX_ALIASES: usize = 16;
/// How many records of an answer are looked at.
const MAX_RECORDS: usize = 512;

pub const ADDRESS: u16 = 1;
const ALIAS: u16 = 5;
pub const INTERNET: u16 = 1;

const IS_ANSWER: u16 = 1 << 15;
const KIND_OF_QUERY: u16 = 0xf << 11;
const IS_TRUNCATED: u16 = 1 << 9;
const WANTS_RECURSION: u16 = 1 << 8;
const HAS_RECURSION: u16 = 1 << 7;
const CODE: u16 = 0xf;

/// How an answer came out (RFC 1035, 4.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    Answered,
    /// There is no such name.
    NoName,
    /// Whoever was asked could not tell.
    Failed,
}

impl Code {
    fn number(self) -> u16 {
        match self {
            Self::Answered => 0,
            Self::Failed => 2,
            Self::NoName => 3,
        }
    }
}

/// One name that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    id: u16,
    wants_recursion: bool,
    /// As it stands in the message, its letters as they were written.
    section: Vec<u8>,
    /// In lower case, without a dot at its end; a `?` for whatever no host's name has.
    pub name: String,
    pub kind: u16,
    pub class: u16,
}

/// What a name leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub code: Code,
    /// There is more, for who asks by TCP.
    pub is_truncated: bool,
    pub addresses: Vec<Ipv4Addr>,
    /// How long this holds.
    pub ttl_s: u32,
}

/// Reads a question; none where it is none that can be answered.
pub fn read_question(message: &[u8]) -> Option<Question> {
    let flags = short(message, 2)?;
    if flags & (IS_ANSWER | KIND_OF_QUERY) != 0 || short(message, 4)? != 1 {
        return None;
    }
    let (labels, end) = read_name(message, HEADER_BYTES)?;
    if labels.len() + 1 != end - HEADER_BYTES {
        // It leads elsewhere in the message, of which nothing else is kept.
        return None;
    }
    Some(Question {
        id: short(message, 0)?,
        wants_recursion: flags & WANTS_RECURSION != 0,
        name: text(&labels),
        kind: short(message, end)?,
        class: short(message, end + 2)?,
        section: message.get(HEADER_BYTES..end + 4)?.to_vec(),
    })
}

impl Question {
    /// The message that asks for it, under another number.
    pub fn ask(&self, id: u16) -> Vec<u8> {
        let mut message = header(id, WANTS_RECURSION, 0);
        message.extend(&self.section);
        message
    }

    /// The message that answers it: with these addresses where they fit in `limit` bytes, else with the word that they do not.
    pub fn answer(&self, code: Code, addresses: &[Ipv4Addr], ttl_s: u32, limit: usize) -> Vec<u8> {
        const RECORD_BYTES: usize = 16;
        let fits = HEADER_BYTES + self.section.len() + addresses.len() * RECORD_BYTES <= limit;
        let told = if fits { addresses } else { &[] };
        let mut flags = IS_ANSWER | HAS_RECURSION | code.number();
        flags |= if fits { 0 } else { IS_TRUNCATED };
        flags |= if self.wants_recursion { WANTS_RECURSION } else { 0 };
        // Whoever writes more than 65,535 has a limit beyond what a message can be.
        let mut message = header(self.id, flags, told.len() as u16);
        message.extend(&self.section);
        for address in told {
            // The name is the question's, which begins behind the header.
            message.extend((0xc000 | HEADER_BYTES as u16).to_be_bytes());
            message.extend([ADDRESS, INTERNET].map(u16::to_be_bytes).concat());
            message.extend(ttl_s.to_be_bytes());
            message.extend(4_u16.to_be_bytes());
            message.extend(address.octets());
        }
        message
    }

    /// Reads what answers [`Question::ask`] with this number; none where it does not.
    pub fn read_answer(&self, id: u16, message: &[u8]) -> Option<Answer> {
        let flags = short(message, 2)?;
        let (labels, end) = read_name(message, HEADER_BYTES)?;
        let is_its = short(message, 0)? == id
            && flags & (IS_ANSWER | KIND_OF_QUERY) == IS_ANSWER
            && short(message, 4)? == 1
            && text(&labels) == self.name
            && (short(message, end)?, short(message, end + 2)?) == (self.kind, self.class);
        if !is_its {
            return None;
        }
        let code = match flags & CODE {
            0 => Code::Answered,
            3 => Code::NoName,
            _ => Code::Failed,
        };
        let is_truncated = flags & IS_TRUNCATED != 0;
        let records = read_records(message, end + 4, short(message, 6)?)?;
        let (addresses, ttl_s) = follow(labels, &records);
        Some(Answer { code, is_truncated, addresses, ttl_s })
    }
}

fn header(id: u16, flags: u16, answers: u16) -> Vec<u8> {
    [id, flags, 1, answers, 0, 0].map(u16::to_be_bytes).concat()
}

/// What of a record matters here. Names are in lower case.
struct Record {
    name: Vec<u8>,
    ttl_s: u32,
    leads_to: LeadsTo,
}

enum LeadsTo {
    Address(Ipv4Addr),
    Name(Vec<u8>),
}

/// None where the message breaks off, unless it says that it does.
fn read_records(message: &[u8], mut place: usize, count: u16) -> Option<Vec<Record>> {
    let is_cut = short(message, 2)? & IS_TRUNCATED != 0;
    let mut records = Vec::new();
    for _ in 0..usize::from(count).min(MAX_RECORDS) {
        let Some((record, end)) = read_record(message, place) else {
            return is_cut.then_some(records);
        };
        records.extend(record);
        place = end;
    }
    Some(records)
}

fn read_record(message: &[u8], place: usize) -> Option<(Option<Record>, usize)> {
    let (name, place) = read_name(message, place)?;
    let (kind, class) = (short(message, place)?, short(message, place + 2)?);
    let ttl_s = u32::from_be_bytes(*message.get(place + 4..)?.first_chunk()?);
    let data = place + 10;
    let end = data + usize::from(short(message, place + 8)?);
    let bytes = message.get(data..end)?;
    let leads_to = match (kind, class) {
        (ADDRESS, INTERNET) => Some(LeadsTo::Address(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?))),
        (ALIAS, INTERNET) => Some(LeadsTo::Name(read_name(message, data)?.0)),
        _ => None,
    };
    Some((leads_to.map(|leads_to| Record { name, ttl_s, leads_to }), end))
}

/// Where a name leads to in the end, and for how long at most.
fn follow(mut name: Vec<u8>, records: &[Record]) -> (Vec<Ipv4Addr>, u32) {
    let mut ttl_s = u32::MAX;
    for _ in 0..=MAX_ALIASES {
        let of_name = records.iter().filter(|record| record.name == name);
        let mut alias = None;
        let mut addresses = Vec::new();
        for record in of_name {
            ttl_s = ttl_s.min(record.ttl_s);
            match &record.leads_to {
                LeadsTo::Address(address) => addresses.push(*address),
                LeadsTo::Name(target) => alias = Some(target.clone()),
            }
        }
        match alias {
            Some(target) if addresses.is_empty() => name = target,
            _ if addresses.is_empty() => break,
            _ => return (addresses, ttl_s),
        }
    }
    (Vec::new(), 0)
}

/// A name's labels, each behind its length, in lower case; and where the message goes on behind it.
fn read_name(message: &[u8], mut place: usize) -> Option<(Vec<u8>, usize)> {
    let mut labels = Vec::new();
    let mut end = None;
    let mut jumps = 0;
    loop {
        let length = *message.get(place)?;
        match length {
            0 => return Some((labels, end.unwrap_or(place + 1))),
            1..=63 => {
                let label = message.get(place + 1..place + 1 + usize::from(length))?;
                labels.push(length);
                labels.extend(label.iter().map(u8::to_ascii_lowercase));
                if labels.len() >= MAX_NAME_BYTES {
                    return None;
                }
                place += 1 + usize::from(length);
            }
            0xc0.. => {
                end = end.or(Some(place + 2));
                place = usize::from(short(message, place)? & 0x3fff);
                jumps += 1;
                if jumps > MAX_JUMPS {
                    return None;
                }
            }
            _ => return None,
        }
    }
}

/// As people write it.
fn text(labels: &[u8]) -> String {
    let mut name = String::new();
    let mut rest = labels;
    while let Some((length, behind)) = rest.split_first() {
        let (label, behind) = behind.split_at(usize::from(*length).min(behind.len()));
        if !name.is_empty() {
            name.push('.');
        }
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-' || *byte == b'_';
        name.extend(label.iter().map(|byte| if is_plain(byte) { char::from(*byte) } else { '?' }));
        rest = behind;
    }
    name
}

fn short(message: &[u8], place: usize) -> Option<u16> {
    message.get(place..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A question for `name`, whose labels are divided by dots.
    fn question(name: &str, kind: u16) -> Vec<u8> {
        let mut message = header(7, WANTS_RECURSION, 0);
        message.extend(name_bytes(name));
        message.extend([kind, INTERNET].map(u16::to_be_bytes).concat());
        message
    }

    fn name_bytes(name: &str) -> Vec<u8> {
        let labels = name.split('.').filter(|label| !label.is_empty());
        let mut bytes: Vec<u8> =
            labels.flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat()).collect();
        bytes.push(0);
        bytes
    }

    fn record(name: &[u8], kind: u16, ttl_s: u32, data: &[u8]) -> Vec<u8> {
        let numbers = [kind, INTERNET].map(u16::to_be_bytes).concat();
        [name, &numbers, &ttl_s.to_be_bytes(), &(data.len() as u16).to_be_bytes(), data].concat()
    }

    fn reply(question: &Question, flags: u16, records: &[Vec<u8>]) -> Vec<u8> {
        let mut message = header(9, IS_ANSWER | flags, records.len() as u16);
        message.extend(&question.section);
        message.extend(records.concat());
        message
    }

    #[test]
    fn a_question_is_read_and_answered_in_its_own_letters() {
        let asked = question("PackAges.example.ORG", ADDRESS);
        let read = read_question(&asked).unwrap();
        assert_eq!((read.name.as_str(), read.kind, read.class), ("packages.example.org", ADDRESS, INTERNET));
        let addresses = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
        let answer = read.answer(Code::Answered, &addresses, 60, 512);
        assert_eq!(answer[12..asked.len()], asked[12..]);
        assert_eq!(short(&answer, 0), Some(7));
        // It is understood by our own reading, too.
        let told = read.read_answer(7, &answer).unwrap();
        assert_eq!(
            told,
            Answer { code: Code::Answered, is_truncated: false, addresses: addresses.to_vec(), ttl_s: 60 }
        );
        let many = vec![addresses[0]; 100];
        let cut = read.read_answer(7, &read.answer(Code::Answered, &many, 60, 512)).unwrap();
        assert!(cut.is_truncated && cut.addresses.is_empty());
        let whole = read.read_answer(7, &read.answer(Code::Answered, &many, 60, 65_535)).unwrap();
        assert_eq!(whole.addresses, many);
        let none = read.read_answer(7, &read.answer(Code::NoName, &[], 0, 512)).unwrap();
        assert_eq!(none.code, Code::NoName);
    }

    #[test]
    fn what_is_no_question_is_left_alone() {
        let good = question("a.example", ADDRESS);
        for (place, value) in [(2, 0x80), (2, 0x28), (5, 2), (5, 0)] {
            let mut bad = good.clone();
            bad[place] = value;
            assert_eq!(read_question(&bad), None, "{place}");
        }
        for end in 0..good.len() {
            assert_eq!(read_question(&good[..end]), None, "{end}");
        }
        // A name that leads back to itself.
        let mut turning = good.clone();
        turning[12..14].copy_from_slice(&[0xc0, 12]);
        assert_eq!(read_question(&turning), None);
        // One that leads into the header, where another number will be.
        let mut leading = good.clone();
        leading[14..16].copy_from_slice(&[0xc0, 0]);
        assert_eq!(read_question(&leading), None);
        let long = read_question(&question(&"a234567890.".repeat(23), ADDRESS));
        assert!(long.is_some());
        assert_eq!(read_question(&question(&"a234567890.".repeat(24), ADDRESS)), None);
        let odd = read_question(&question("a\0b c.d\u{fc}", ADDRESS)).unwrap();
        assert_eq!(odd.name, "a?b?c.d??");
    }

    #[test]
    fn a_label_with_a_dot_in_it_is_no_name_of_a_host() {
        let mut message = header(7, 0, 0);
        message.extend([&[9_u8][..], b"a.example", &[0, 0, 1, 0, 1]].concat());
        assert_eq!(read_question(&message).unwrap().name, "a?example");
    }

    #[test]
    fn aliases_are_followed_to_their_addresses() {
        let asked = read_question(&question("a.example", ADDRESS)).unwrap();
        let alias = |from: &str, to: &str, ttl_s| record(&name_bytes(from), ALIAS, ttl_s, &name_bytes(to));
        let address = |name: &str, last| record(&name_bytes(name), ADDRESS, 300, &[192, 0, 2, last]);
        // In any order, in any letters, and beside what is of no concern.
        let records = [
            address("C.example", 3),
            address("evil.example", 66),
            alias("b.example", "c.Example", 5),
            record(&[0xc0, 12], 46, 1, b"signature"),
            alias("A.example", "B.example", 60),
            address("c.example", 4),
        ];
        let told = asked.read_answer(9, &reply(&asked, 0, &records)).unwrap();
        assert_eq!(told.addresses, [Ipv4Addr::new(192, 0, 2, 3), Ipv4Addr::new(192, 0, 2, 4)]);
        assert_eq!(told.ttl_s, 5);
        let turning = [alias("a.example", "b.example", 1), alias("b.example", "a.example", 1)];
        assert!(asked.read_answer(9, &reply(&asked, 0, &turning)).unwrap().addresses.is_empty());
    }

    #[test]
    fn only_its_own_answer_is_taken() {
        let asked = read_question(&question("a.example", ADDRESS)).unwrap();
        let good = reply(&asked, 0, &[record(&[0xc0, 12], ADDRESS, 0, &[192, 0, 2, 1])]);
        assert_eq!(asked.read_answer(9, &good).unwrap().addresses.len(), 1);
        assert_eq!(asked.read_answer(8, &good), None);
        let other = read_question(&question("b.example", ADDRESS)).unwrap();
        assert_eq!(other.read_answer(9, &good), None);
        let other = read_question(&question("a.example", 28)).unwrap();
        assert_eq!(other.read_answer(9, &good), None);
        for end in 0..good.len() {
            assert_eq!(asked.read_answer(9, &good[..end]), None, "{end}");
        }
        let cut = reply(&asked, IS_TRUNCATED, &[record(&[0xc0, 12], ADDRESS, 0, &[192, 0, 2, 1])]);
        assert!(asked.read_answer(9, &cut[..cut.len() - 3]).unwrap().is_truncated);
        assert_eq!(asked.read_answer(9, &reply(&asked, 2, &[])).unwrap().code, Code::Failed);
        assert_eq!(asked.read_answer(9, &reply(&asked, 5, &[])).unwrap().code, Code::Failed);
        assert_eq!(asked.read_answer(9, &reply(&asked, 3, &[])).unwrap().code, Code::NoName);
    }
}
