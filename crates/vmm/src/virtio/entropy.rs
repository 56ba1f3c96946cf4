//! Gives a guest random bytes of the host's (virtio 1.2, section 5.4).

use rustix::rand::{GetRandomFlags, getrandom};

use super::{Broken, Cause, Device, Kind, Queues};

/// How many bytes one request gets at most: the driver takes fewer than it asked for.
const MOST_BYTES: usize = 4096;
const PIECE_BYTES: usize = 256;

/// The device. It has no state of its own.
#[derive(Debug, Default)]
pub struct Entropy;

impl Device for Entropy {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn serve(&mut self, _: Cause, queues: &mut Queues<'_>) -> Result<(), Broken> {
        while let Some(mut chain) = queues.pop(0)? {
            let mut written = 0;
            while written < MOST_BYTES && chain.writable.bytes() > 0 {
                let mut piece = [0; PIECE_BYTES];
                // The host's pool is filled long before a guest runs on it; what cannot be had is not made up.
                let Ok(random) = getrandom(&mut piece, GetRandomFlags::empty()) else { break };
                written += chain.writable.write(&piece[..random.min(PIECE_BYTES)]);
            }
            queues.push(0, chain.head, written as u32)?;
        }
        Ok(())
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::super::driver::{DATA, Driver, Part};
    use super::*;

    #[test]
    fn what_is_asked_for_is_filled() {
        let mut driver = Driver::started(Entropy, 0);
        let chain = driver.offer(0, &[Part::Write(DATA, 16), Part::Write(DATA + 100, 300)]);
        driver.notify(0);
        assert_eq!(driver.used(0), Some((chain, 316)));
        assert_eq!(driver.interrupts(), 1);
        let (first, second) = (driver.bytes(DATA, 16), driver.bytes(DATA + 100, 300));
        assert!(first.iter().any(|byte| *byte != 0) && second[290..].iter().any(|byte| *byte != 0));
        assert_eq!(driver.bytes(DATA + 16, 84), [0; 84], "bytes beside the buffers");
    }

    #[test]
    fn one_request_gets_a_bounded_amount() {
        let mut driver = Driver::started(Entropy, 0);
        let chain = driver.offer(0, &[Part::Write(DATA, 1 << 16)]);
        driver.notify(0);
        assert_eq!(driver.used(0), Some((chain, MOST_BYTES as u32)));
        let chain = driver.offer(0, &[Part::Read(b"to read")]);
        driver.notify(0);
        assert_eq!(driver.used(0), Some((chain, 0)));
    }
}
