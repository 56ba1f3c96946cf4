//! Handles what controllers do: arrive, say which agents exist and what is wanted, answer agents, ask, and go.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use prost::Message;
use sealci_core::ids::{AgentId, AttemptId, InstanceId, PipelineId, ReplicaId};
use sealci_proto::agent::{self, scheduler_message as to_agent_message};
use sealci_proto::scheduler::{self, EnrolRefusal, controller_message, scheduler_message, to_agent};
use sealci_proto::{Malformed, attempt_id};
use tracing::{info, warn};

use super::directory::{Directory, Entry};
use super::{ControllerId, Ended, EnrolId, EnrolRefused, Output, Scheduler, SessionId, Timer};

/// Anyone may ask to enrol: what is passed on of it is bounded.
const MAX_ENROL_BYTES: usize = 4 << 10;

/// One stream of a controller.
#[derive(Debug)]
pub(super) struct Controller {
    replica: ReplicaId,
    /// It has said which agents exist.
    has_directory: bool,
    /// The unfinished pipelines when it connected, once it has said which.
    snapshot: Option<HashMap<PipelineId, u64>>,
}

/// A question that is answered at the end of the round, when everything that could be placed has been.
#[derive(Debug)]
pub(super) struct Question {
    controller: ControllerId,
    request: u64,
    attempt: Option<AttemptId>,
}

impl Scheduler {
    pub(super) fn controller_arrived(&mut self, now: Duration, id: ControllerId, hello: scheduler::Hello) {
        let protocol = match self.common_protocol(hello.protocol_min, hello.protocol_max) {
            Ok(protocol) => protocol,
            Err(ended) => return self.refuse_controller(id, ended),
        };
        let replica: ReplicaId = match hello.replica_id.parse() {
            Ok(replica) => replica,
            Err(error) => return self.refuse_controller(id, Malformed::from(error).into()),
        };
        let older: Vec<_> = self
            .controllers
            .iter()
            .filter(|(_, controller)| controller.replica == replica)
            .map(|(older, _)| *older)
            .collect();
        for older in older {
            self.refuse_controller(older, Ended::Replaced);
            self.controller_gone(now, older);
        }
        info!(controller.replica = %replica, controller.stream = id.0, "a controller connected");
        self.deserted_at = None;
        self.controllers.insert(id, Controller { replica, has_directory: false, snapshot: None });
        let welcome = scheduler::Welcome { protocol, incarnation: self.incarnation };
        self.tell_controller(id, scheduler_message::Body::Welcome(welcome));
        let sessions: Vec<_> = self.sessions.keys().copied().collect();
        for session in sessions {
            self.announce_to(id, session, true);
        }
        self.credit.return_dropped();
    }

    fn refuse_controller(&mut self, controller: ControllerId, ended: Ended) {
        self.outputs.push(Output::EndController { controller, ended });
    }

    pub(super) fn controller_gone(&mut self, now: Duration, id: ControllerId) {
        if self.controllers.remove(&id).is_none() {
            return;
        }
        info!(controller.stream = id.0, "a controller's stream ended");
        self.credit.controller_gone(id);
        if self.controllers.is_empty() {
            self.deserted_at = Some(now);
            self.timers.set(now + self.settings.deserted_after, Timer::Deserted);
        } else {
            self.credit.return_dropped();
        }
        self.questions.retain(|question| question.controller != id);
        let asked: Vec<_> =
            self.enrols.iter().filter(|(_, asked)| **asked == id).map(|(request, _)| *request).collect();
        for request in asked {
            self.enrolled(request, Err(EnrolRefused::NoController));
        }
    }

    /// No controller has come back: the agents may reach one through another scheduler. Whoever stays, or comes, waits here
    /// as after a start. What they run goes on.
    pub(super) fn deserted_due(&mut self, now: Duration) {
        let waited = self.settings.deserted_after;
        if self.deserted_at.is_none_or(|since| since + waited > now) {
            return;
        }
        self.deserted_at = None;
        let sessions: Vec<_> = self.sessions.keys().copied().collect();
        for session in sessions {
            self.end_session(now, session, Some(Ended::Deserted { waited }));
        }
        self.directory = Directory::default();
    }

    pub(super) fn controller_said(
        &mut self,
        now: Duration,
        id: ControllerId,
        message: controller_message::Body,
    ) {
        if !self.controllers.contains_key(&id) {
            return;
        }
        use controller_message::Body;
        let taken = match message {
            Body::Hello(_) => Err(Malformed("`hello` comes once".into())),
            Body::Directory(directory) => self.take_directory(now, id, directory),
            Body::Snapshot(snapshot) => self.take_snapshot(id, snapshot),
            Body::Wants(wants) => self.take_wants(now, id, wants),
            Body::ToAgent(message) => {
                self.pass_on(id, message);
                Ok(())
            }
            Body::EnrolAnswer(answer) => {
                self.take_enrol_answer(id, answer);
                Ok(())
            }
            Body::WhyQuestion(question) => {
                let attempt = attempt_id(&question.attempt).ok();
                self.questions.push(Question { controller: id, request: question.request, attempt });
                Ok(())
            }
        };
        if let Err(malformed) = taken {
            warn!(controller.stream = id.0, error = %malformed, "a controller's stream is ended");
            self.refuse_controller(id, malformed.into());
            self.controller_gone(now, id);
        }
    }

    fn take_directory(
        &mut self,
        now: Duration,
        id: ControllerId,
        directory: scheduler::Directory,
    ) -> Result<(), Malformed> {
        let entries = directory.agents.into_iter().map(Entry::try_from).collect::<Result<Vec<_>, _>>()?;
        let mut left_out: BTreeSet<AgentId> = BTreeSet::new();
        if directory.complete {
            // Another replica may have just enrolled an agent that this one had not read yet.
            let speaks_alone =
                !self.controllers.iter().any(|(other, controller)| *other != id && controller.has_directory);
            if speaks_alone {
                left_out = self.directory.ids().collect();
            }
            if let Some(controller) = self.controllers.get_mut(&id) {
                controller.has_directory = true;
            }
        }
        for entry in entries {
            match entry {
                Entry::Known(agent, known) => {
                    left_out.remove(&agent);
                    let before = self.directory.set(agent, known.clone());
                    if before.as_ref() != Some(&known) {
                        let another =
                            before.is_some_and(|before| before.credential_sha256 != known.credential_sha256);
                        self.agent_changed(now, agent, another);
                    }
                }
                Entry::Removed(agent) => drop(left_out.insert(agent)),
            }
        }
        for agent in left_out {
            self.directory.remove(agent);
            for session in self.sessions_of(agent) {
                self.end_session(now, session, Some(Ended::Removed { agent }));
            }
        }
        if directory.complete {
            if !self.directory.complete {
                self.settled_at = now + self.settings.settle_at_most;
                self.timers.set(self.settled_at, Timer::Settled);
            }
            self.directory.complete = true;
            self.admit_arrivals(now);
        }
        Ok(())
    }

    /// Applies what the directory says now to the agent's streams.
    fn agent_changed(&mut self, now: Duration, agent: AgentId, has_another_credential: bool) {
        let sessions = self.sessions_of(agent);
        if has_another_credential {
            for session in sessions {
                self.end_session(now, session, Some(Ended::Unauthenticated { agent }));
            }
            return;
        }
        let Some(known) = self.directory.agent(agent).cloned() else { return };
        self.placement.set_name(agent, known.name);
        self.placement.set_drained(agent, known.drained);
        // Whoever is not current any more goes out before the other comes in.
        let (current, others): (Vec<_>, Vec<_>) = sessions.into_iter().partition(|session| {
            self.sessions.get(session).is_some_and(|session| Some(session.instance) == known.current)
        });
        for session in others.into_iter().chain(current) {
            self.stand(now, session);
        }
    }

    fn sessions_of(&self, agent: AgentId) -> Vec<SessionId> {
        let first = (agent, InstanceId::from_uuid(Default::default()));
        self.streams
            .range(first..)
            .take_while(|((other, _), _)| *other == agent)
            .map(|(_, session)| *session)
            .collect()
    }

    fn take_snapshot(&mut self, id: ControllerId, snapshot: scheduler::Snapshot) -> Result<(), Malformed> {
        let mut epochs = HashMap::with_capacity(snapshot.pipelines.len());
        for pipeline in snapshot.pipelines {
            epochs.insert(pipeline.pipeline_id.parse()?, pipeline.epoch);
        }
        if let Some(controller) = self.controllers.get_mut(&id) {
            controller.snapshot = Some(epochs);
        }
        self.take_snapshot_epochs();
        Ok(())
    }

    /// The highest epoch that a connected controller's snapshot names for the pipeline.
    pub(super) fn snapshot_epoch(&self, pipeline: PipelineId) -> Option<u64> {
        self.controllers
            .values()
            .filter_map(|controller| controller.snapshot.as_ref()?.get(&pipeline).copied())
            .max()
    }

    /// Whether a connected controller has said which pipelines are unfinished. Without, nothing is placed.
    pub(super) fn knows_what_is_unfinished(&self) -> bool {
        self.controllers.values().any(|controller| controller.snapshot.is_some())
    }

    fn pass_on(&mut self, id: ControllerId, message: scheduler::ToAgent) {
        let session = SessionId(message.session);
        let body = match message.body {
            Some(to_agent::Body::ClaimAnswer(answer)) => to_agent_message::Body::ClaimAnswer(answer),
            Some(to_agent::Body::Ack(ack)) => to_agent_message::Body::Ack(ack),
            Some(to_agent::Body::Renewed(renewed)) => to_agent_message::Body::Renewed(renewed),
            Some(to_agent::Body::ReleasedBytes(bytes)) => {
                return self.credit.release(session, id, bytes);
            }
            None => return,
        };
        if self.sessions.contains_key(&session) {
            self.tell_agent(session, body);
        }
    }

    pub(super) fn enrol(&mut self, now: Duration, request: EnrolId, enrol: agent::EnrolRequest) {
        let Some(controller) = self.controllers.keys().next().copied() else {
            return self.enrolled(request, Err(EnrolRefused::NoController));
        };
        if enrol.encoded_len() > MAX_ENROL_BYTES {
            let because = format!("a request to enrol has at most {MAX_ENROL_BYTES} bytes");
            return self.enrolled(request, Err(EnrolRefused::Invalid(because)));
        }
        if self.enrols.len() >= self.settings.max_waiting {
            let waiting = self.enrols.len();
            return self.enrolled(request, Err(EnrolRefused::TooMany { waiting }));
        }
        self.enrols.insert(request, controller);
        self.timers.set(now + self.settings.enrol_timeout, Timer::Enrol(request));
        let question = scheduler::EnrolQuestion { request: request.0, enrol: Some(enrol) };
        self.tell_controller(controller, scheduler_message::Body::EnrolQuestion(question));
    }

    pub(super) fn enrol_due(&mut self, request: EnrolId) {
        if self.enrols.contains_key(&request) {
            let waited = self.settings.enrol_timeout;
            self.enrolled(request, Err(EnrolRefused::TimedOut { waited }));
        }
    }

    fn take_enrol_answer(&mut self, id: ControllerId, answer: scheduler::EnrolAnswer) {
        let request = EnrolId(answer.request);
        if self.enrols.get(&request) != Some(&id) {
            return;
        }
        let refusal = answer.refusal();
        let because = answer.refused_because;
        let result = match refusal {
            _ if because.is_empty() => Ok(()),
            EnrolRefusal::Unauthenticated => Err(EnrolRefused::Unauthenticated(because)),
            EnrolRefusal::AlreadyExists => Err(EnrolRefused::AlreadyExists(because)),
            EnrolRefusal::Invalid => Err(EnrolRefused::Invalid(because)),
            EnrolRefusal::Unspecified => Err(EnrolRefused::Other(because)),
        };
        self.enrolled(request, result);
    }

    fn enrolled(&mut self, request: EnrolId, result: Result<(), EnrolRefused>) {
        self.enrols.remove(&request);
        self.outputs.push(Output::Enrolled { request, result });
    }

    pub(super) fn answer_questions(&mut self) {
        for question in std::mem::take(&mut self.questions) {
            let reasons = question.attempt.and_then(|attempt| self.why(attempt));
            let answer = scheduler::WhyAnswer {
                request: question.request,
                queued: reasons.is_some(),
                reasons: reasons.unwrap_or_default(),
            };
            self.tell_controller(question.controller, scheduler_message::Body::WhyAnswer(answer));
        }
    }
}
