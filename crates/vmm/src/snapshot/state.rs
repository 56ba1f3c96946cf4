//! Writes and reads the file of a snapshot that is not its memory.
//!
//! ```text
//!   "SEALCIVM"  format u32  bytes u32  CRC-32 of them u32  │ fields
//! ```

use thiserror::Error;
use virtio_queue::QueueState;
use vm_superio::SerialState;

use super::fields::{Fields, Malformed, Writer};
use crate::virtio::Kind;
use crate::virtio::mmio::TransportState;
use crate::x86_64::layout;
use crate::x86_64::state::ProcessorsState;

const MAGIC: [u8; 8] = *b"SEALCIVM";
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = MAGIC.len() + 12;
/// Which program writes these: what a device keeps may change with any.
const MONITOR: &str = env!("CARGO_PKG_VERSION");
/// A transport has no more.
const MOST_QUEUES: usize = 64;
/// What the serial line's model keeps of what came in.
const MOST_SERIAL_BYTES: usize = 64;

/// Why bytes are no state to go on from.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    #[error("it is no snapshot's")]
    Foreign,
    #[error("its format is {found}, and this sealci-vmm reads {FORMAT}")]
    Format { found: u32 },
    #[error("it is truncated: it says that it has {expected} bytes, and has {actual}")]
    Truncated { expected: usize, actual: usize },
    #[error("it is damaged: its sum is another")]
    Damaged,
    #[error("it is of sealci-vmm {found}, and this is {MONITOR}")]
    Monitor { found: String },
    #[error("it is damaged")]
    Malformed(#[from] Malformed),
}

/// What of a machine is in no memory.
#[derive(Debug, Clone)]
pub struct State {
    /// What whoever saved it says that it was made of.
    pub made_of: String,
    pub memory_mebibytes: u64,
    pub serial: Option<SerialState>,
    pub processors: ProcessorsState,
    pub devices: Vec<TransportState>,
}

impl State {
    /// The whole file.
    pub fn encode(&self) -> Vec<u8> {
        let mut fields = Writer::default();
        fields.bytes(MONITOR.as_bytes());
        fields.bytes(self.made_of.as_bytes());
        fields.u64(self.memory_mebibytes);
        fields.u8(self.serial.is_some().into());
        if let Some(serial) = &self.serial {
            encode_serial(serial, &mut fields);
        }
        self.processors.encode(&mut fields);
        fields.count(self.devices.len());
        for device in &self.devices {
            encode_device(device, &mut fields);
        }
        let fields = fields.0;
        let mut file = Writer(MAGIC.to_vec());
        file.u32(FORMAT);
        file.count(fields.len());
        file.u32(crc32fast::hash(&fields));
        file.0.extend(fields);
        file.0
    }

    pub fn decode(file: &[u8]) -> Result<Self, DecodeError> {
        let Some((header, fields)) = file.split_at_checked(HEADER_BYTES) else {
            return Err(DecodeError::Foreign);
        };
        let Some(header) = header.strip_prefix(&MAGIC) else { return Err(DecodeError::Foreign) };
        let mut header = Fields::of(header);
        let found = header.u32("format")?;
        if found != FORMAT {
            return Err(DecodeError::Format { found });
        }
        let (expected, sum) = (header.u32("length")? as usize, header.u32("sum")?);
        if fields.len() != expected {
            return Err(DecodeError::Truncated { expected, actual: fields.len() });
        }
        if crc32fast::hash(fields) != sum {
            return Err(DecodeError::Damaged);
        }
        Self::decode_fields(fields)
    }

    /// What follows the header.
    pub fn decode_fields(fields: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::of(fields);
        let found = fields.text("monitor")?;
        if found != MONITOR {
            return Err(DecodeError::Monitor { found });
        }
        let made_of = fields.text("what it is made of")?;
        let memory_mebibytes = fields.u64("memory")?;
        let serial = if fields.flag("serial line")? { Some(decode_serial(&mut fields)?) } else { None };
        let processors = ProcessorsState::decode(&mut fields)?;
        let mut devices = Vec::new();
        for _ in 0..fields.count(layout::MAX_DEVICES, "devices")? {
            devices.push(decode_device(&mut fields)?);
        }
        fields.end()?;
        Ok(Self { made_of, memory_mebibytes, serial, processors, devices })
    }
}

fn encode_serial(state: &SerialState, to: &mut Writer) {
    for register in [
        state.baud_divisor_low,
        state.baud_divisor_high,
        state.interrupt_enable,
        state.interrupt_identification,
        state.line_control,
        state.line_status,
        state.modem_control,
        state.modem_status,
        state.scratch,
    ] {
        to.u8(register);
    }
    to.bytes(&state.in_buffer);
}

fn decode_serial(from: &mut Fields<'_>) -> Result<SerialState, Malformed> {
    const FIELD: &str = "serial line";
    Ok(SerialState {
        baud_divisor_low: from.u8(FIELD)?,
        baud_divisor_high: from.u8(FIELD)?,
        interrupt_enable: from.u8(FIELD)?,
        interrupt_identification: from.u8(FIELD)?,
        line_control: from.u8(FIELD)?,
        line_status: from.u8(FIELD)?,
        modem_control: from.u8(FIELD)?,
        modem_status: from.u8(FIELD)?,
        scratch: from.u8(FIELD)?,
        in_buffer: match from.bytes(FIELD)? {
            bytes if bytes.len() <= MOST_SERIAL_BYTES => bytes.to_vec(),
            _ => return Err(Malformed { field: FIELD }),
        },
    })
}

fn encode_device(state: &TransportState, to: &mut Writer) {
    to.u32(state.kind as u32);
    for register in [
        state.status,
        state.interrupt_status,
        state.device_features_select,
        state.driver_features_select,
        state.queue_select,
        state.generation,
    ] {
        to.u32(register);
    }
    to.u64(state.driver_features);
    to.count(state.queues.len());
    for queue in &state.queues {
        for number in [queue.max_size, queue.size, queue.next_avail, queue.next_used] {
            to.u16(number);
        }
        to.u8(queue.event_idx_enabled.into());
        to.u8(queue.ready.into());
        for place in [queue.desc_table, queue.avail_ring, queue.used_ring] {
            to.u64(place);
        }
    }
    to.bytes(&state.own);
}

fn decode_device(from: &mut Fields<'_>) -> Result<TransportState, Malformed> {
    const FIELD: &str = "device";
    let kind = from.u32(FIELD)?;
    let kinds = [Kind::Net, Kind::Block, Kind::Entropy, Kind::Balloon, Kind::Vsock];
    let kind = kinds.into_iter().find(|known| *known as u32 == kind).ok_or(Malformed { field: FIELD })?;
    let mut state = TransportState {
        kind,
        status: from.u32(FIELD)?,
        interrupt_status: from.u32(FIELD)?,
        device_features_select: from.u32(FIELD)?,
        driver_features_select: from.u32(FIELD)?,
        queue_select: from.u32(FIELD)?,
        generation: from.u32(FIELD)?,
        driver_features: from.u64(FIELD)?,
        queues: Vec::new(),
        own: Vec::new(),
    };
    for _ in 0..from.count(MOST_QUEUES, "queues")? {
        state.queues.push(decode_queue(from)?);
    }
    state.own = from.bytes("what a device keeps")?.to_vec();
    Ok(state)
}

fn decode_queue(from: &mut Fields<'_>) -> Result<QueueState, Malformed> {
    const FIELD: &str = "queue";
    Ok(QueueState {
        max_size: from.u16(FIELD)?,
        size: from.u16(FIELD)?,
        next_avail: from.u16(FIELD)?,
        next_used: from.u16(FIELD)?,
        event_idx_enabled: from.flag(FIELD)?,
        ready: from.flag(FIELD)?,
        desc_table: from.u64(FIELD)?,
        avail_ring: from.u64(FIELD)?,
        used_ring: from.u64(FIELD)?,
    })
}

#[cfg(test)]
mod tests;
