//! Knows what names have led to, and until when that is open.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::rules::{Destination, MAX_OPEN};

/// How much longer than an answer holds may be connected to where it leads: for programs that are slow, or that keep what
/// they were told a little too long. Connections that stand are not ended.
const GRACE: Duration = Duration::from_secs(120);
/// The longest that an answer is taken to hold.
const MAX_TTL_S: u32 = 3600;

/// What is open.
#[derive(Debug, Default)]
pub struct Opened {
    destinations: HashMap<Destination, Opening>,
    /// Not later than the first end of all.
    first_end: Option<Instant>,
}

#[derive(Debug)]
struct Opening {
    /// That led there last.
    name: String,
    until: Instant,
}

impl Opened {
    /// Adds what a name leads to; returns what was not open before, or none where it is too much.
    pub fn add(
        &mut self,
        name: &str,
        addresses: &[Ipv4Addr],
        ports: &[u16],
        ttl_s: u32,
        now: Instant,
    ) -> Option<Vec<Destination>> {
        let pairs = addresses.iter().flat_map(|address| ports.iter().map(|port| (*address, *port)));
        let mut new: Vec<Destination> =
            pairs.clone().filter(|pair| !self.destinations.contains_key(pair)).collect();
        new.sort_unstable();
        new.dedup();
        if self.destinations.len() + new.len() > MAX_OPEN {
            return None;
        }
        let until = now + Duration::from_secs(ttl_s.min(MAX_TTL_S).into()) + GRACE;
        for pair in pairs {
            let former = self.destinations.get(&pair).map(|opening| opening.until);
            let until = former.map_or(until, |former| former.max(until));
            self.destinations.insert(pair, Opening { name: name.to_owned(), until });
        }
        if !addresses.is_empty() {
            self.first_end = Some(self.first_end.map_or(until, |first| first.min(until)));
        }
        Some(new)
    }

    /// Forgets what has had its time, and returns it.
    pub fn take_ended(&mut self, now: Instant) -> Vec<Destination> {
        if self.first_end.is_none_or(|first| first > now) {
            return Vec::new();
        }
        let ended: Vec<Destination> =
            self.destinations.extract_if(|_, opening| opening.until <= now).map(|(pair, _)| pair).collect();
        self.first_end = self.destinations.values().map(|opening| opening.until).min();
        ended
    }

    pub fn first_end(&self) -> Option<Instant> {
        self.first_end
    }

    /// The name that led there.
    pub fn name(&self, address: Ipv4Addr, port: u16) -> Option<&str> {
        self.destinations.get(&(address, port)).map(|opening| opening.name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_name_led_to_ends_after_its_time() {
        let mut opened = Opened::default();
        let (first, second) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2));
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let new = opened.add("a.example", &[first, second, first], &[80, 443], 0, begin).unwrap();
        assert_eq!(new, [(first, 80), (first, 443), (second, 80), (second, 443)]);
        assert_eq!(opened.name(first, 443), Some("a.example"));
        // Again, for longer, and by another name.
        assert_eq!(opened.add("b.example", &[second], &[80], 300, begin).unwrap(), []);
        assert_eq!(opened.add("c.example", &[second], &[80], 0, begin).unwrap(), []);
        assert_eq!(opened.name(second, 80), Some("c.example"));
        assert!(opened.take_ended(at(119)).is_empty());
        assert_eq!(opened.first_end(), Some(at(120)));
        let mut ended = opened.take_ended(at(120));
        ended.sort_unstable();
        assert_eq!(ended, [(first, 80), (first, 443), (second, 443)]);
        assert_eq!(opened.first_end(), Some(at(420)));
        assert_eq!(opened.take_ended(at(1_000_000)), [(second, 80)]);
        assert_eq!(opened.first_end(), None);
        // However long it is said to hold.
        opened.add("d.example", &[first], &[80], u32::MAX, begin).unwrap();
        assert_eq!(opened.first_end(), Some(at(3720)));
    }

    #[test]
    fn no_more_is_open_than_there_is_room_for() {
        let mut opened = Opened::default();
        let now = Instant::now();
        let addresses: Vec<_> = (0..128_u32).map(|number| Ipv4Addr::from(number + 1)).collect();
        let ports: Vec<u16> = (1..=64).collect();
        assert_eq!(opened.add("a", &addresses, &ports, 1, now).unwrap().len(), MAX_OPEN);
        assert_eq!(opened.add("b", &addresses, &ports, 1, now).unwrap().len(), 0);
        assert_eq!(opened.add("c", &[Ipv4Addr::BROADCAST], &[1], 1, now), None);
        assert_eq!(opened.name(addresses[0], 1), Some("b"));
    }
}
