//! Decides how long to wait before the next try. Pure: the randomness comes in.

use std::time::Duration;

/// Waits that double up to a bound, each shortened by chance, so that many agents do not come back in step.
#[derive(Debug, Clone)]
pub struct Backoff {
    shortest: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub fn new(shortest: Duration, longest: Duration) -> Self {
        Self { shortest, longest, next: shortest }
    }

    /// The next wait: between half of it and all of it, by `random` in 0..1.
    pub fn wait(&mut self, random: f64) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.longest);
        wait.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
    }

    /// A try succeeded: the next wait is short again.
    pub fn reset(&mut self) {
        self.next = self.shortest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A scheduler is away for a minute and a thousand agents try: they spread, and none waits for long once it is back.
    #[test]
    fn a_thousand_agents_do_not_come_in_step() {
        let mut tries_in_second = [0_u32; 90];
        let mut longest = Duration::ZERO;
        for agent in 0..1000_u32 {
            // Any sequence that differs from agent to agent.
            let mut state = u64::from(agent) + 1;
            let mut random = move || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 11) as f64 / (1_u64 << 53) as f64
            };
            let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
            let mut at = Duration::ZERO;
            while at < Duration::from_secs(90) {
                let wait = backoff.wait(random());
                longest = longest.max(wait);
                at += wait;
                if let Some(tries) = tries_in_second.get_mut(at.as_secs() as usize) {
                    *tries += 1;
                }
            }
        }
        assert!(longest <= Duration::from_secs(10));
        // One in 7.5 s each would be 133 a second.
        let most = tries_in_second[60..].iter().max().copied().unwrap_or_default();
        assert!(most < 200, "{tries_in_second:?}");
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(350));
        let waits: Vec<u128> = (0..4).map(|_| backoff.wait(1.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 350, 350]);
        backoff.reset();
        assert_eq!(backoff.wait(0.0).as_millis(), 50);
    }
}
