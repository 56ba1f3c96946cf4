//! Finds the device that an access of the guest is for, by port or by address.
//!
//! What no device answers to reads as ones and takes every write, as on a PC's bus.

use std::sync::Arc;

use thiserror::Error;

/// What the guest reads and writes, by any virtual CPU's thread. Offsets count from the beginning of the device's range.
pub trait Device: Send + Sync {
    fn read(&self, offset: u64, data: &mut [u8]);
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices claim the same addresses.
#[derive(Debug, Error)]
#[error("two devices are at {begin:#x}")]
pub struct Overlap {
    begin: u64,
}

/// The devices of one kind of address.
#[derive(Default)]
pub struct Bus {
    /// By address; none overlaps another.
    slots: Vec<Slot>,
}

struct Slot {
    begin: u64,
    end: u64,
    device: Arc<dyn Device>,
}

impl Bus {
    /// Puts a device at `bytes` addresses from `begin` on.
    pub fn add(&mut self, begin: u64, bytes: u64, device: Arc<dyn Device>) -> Result<(), Overlap> {
        let end = begin + bytes;
        let at = self.slots.partition_point(|slot| slot.end <= begin);
        if self.slots.get(at).is_some_and(|next| next.begin < end) {
            return Err(Overlap { begin });
        }
        self.slots.insert(at, Slot { begin, end, device });
        Ok(())
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some(slot) => slot.device.read(address - slot.begin, data),
            None => data.fill(0xff),
        }
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some(slot) = self.find(address, data.len()) {
            slot.device.write(address - slot.begin, data);
        }
    }

    /// Whose range the whole access lies in.
    fn find(&self, address: u64, bytes: usize) -> Option<&Slot> {
        let slot = self.slots.get(self.slots.partition_point(|slot| slot.end <= address))?;
        let end = address.checked_add(bytes as u64)?;
        (slot.begin <= address && end <= slot.end).then_some(slot)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Reads as its own number, and remembers what was written last.
    struct Echo(u8, Mutex<Option<(u64, Vec<u8>)>>);

    impl Device for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            *self.1.lock().unwrap() = Some((offset, data.to_vec()));
        }
    }

    fn echo(number: u8) -> Arc<Echo> {
        Arc::new(Echo(number, Mutex::new(None)))
    }

    #[test]
    fn an_access_finds_its_device() {
        let mut bus = Bus::default();
        let (low, high) = (echo(10), echo(20));
        bus.add(0x2000, 0x10, high.clone()).unwrap();
        bus.add(0x1000, 0x1000, low.clone()).unwrap();
        let read = |address| {
            let mut data = [0; 2];
            bus.read(address, &mut data);
            data[0]
        };
        assert_eq!((read(0x1000), read(0x1001), read(0x2000)), (10, 11, 20));
        for nobodys in [0, 0xfff, 0x1fff, 0x200f, 0x2010, u64::MAX] {
            assert_eq!(read(nobodys), 0xff, "{nobodys:#x}");
        }
        bus.write(0x2004, &[1, 2]);
        bus.write(0x200f, &[1, 2]);
        assert_eq!(*high.1.lock().unwrap(), Some((4, vec![1, 2])));
        assert_eq!(*low.1.lock().unwrap(), None);
    }

    #[test]
    fn no_two_devices_are_at_one_address() {
        let mut bus = Bus::default();
        bus.add(0x1000, 0x1000, echo(0)).unwrap();
        for (begin, bytes) in [(0x1000, 1), (0xfff, 2), (0x1fff, 0x1000), (0, 0x10_0000)] {
            assert!(bus.add(begin, bytes, echo(1)).is_err(), "{begin:#x}");
        }
        bus.add(0xfff, 1, echo(2)).unwrap();
        bus.add(0x2000, 1, echo(3)).unwrap();
    }
}
