//! Runs one table of behaviours over every executor that runs real commands through the real init.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod allowed;
mod as_user;
mod behaviour;
mod company;
mod containers;
mod daemons;
mod dockers;
mod doors;
mod ending;
mod images;
mod lab;
mod machines;
mod network;
mod sealing;
mod templates;
mod volume;

use lab::Lab;

/// One module of tests for each executor, each with every behaviour.
macro_rules! executors {
    ($($executor:ident),* ; $($behaviour:path as $name:ident),* $(,)?) => {
        executors!(@ [$($executor)*] [$($behaviour as $name),*]);
    };
    (@ [$($executor:ident)*] $behaviours:tt) => {
        $(executors!(@@ $executor $behaviours);)*
    };
    (@@ $executor:ident [$($behaviour:path as $name:ident),*]) => {
        mod $executor {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    if let Some(lab) = super::Lab::$executor() {
                        $behaviour(&lab).await;
                        lab.executor.close().await;
                    }
                }
            )*
        }
    };
}

executors! {
    process, process_in_cgroup, sandbox, rootless, container, rootless_container, docker;
    crate::behaviour::exit_codes_are_the_shells as exit_codes_are_the_shells,
    crate::behaviour::one_shell_runs_all_commands as one_shell_runs_all_commands,
    crate::behaviour::a_failure_stops_what_follows as a_failure_stops_what_follows,
    crate::behaviour::a_broken_command_breaks_alone as a_broken_command_breaks_alone,
    crate::behaviour::odd_commands_do_what_a_script_does as odd_commands_do_what_a_script_does,
    crate::behaviour::bash_runs_when_asked as bash_runs_when_asked,
    crate::behaviour::a_missing_shell_is_our_error as a_missing_shell_is_our_error,
    crate::behaviour::output_belongs_to_its_command as output_belongs_to_its_command,
    crate::behaviour::both_outputs_keep_their_order as both_outputs_keep_their_order,
    crate::behaviour::the_environment_is_the_actions_alone as the_environment_is_the_actions_alone,
    crate::behaviour::no_descriptor_leaks as no_descriptor_leaks,
    crate::behaviour::meddling_hurts_only_the_meddler as meddling_hurts_only_the_meddler,
    crate::behaviour::resource_use_is_told as resource_use_is_told,
    crate::behaviour::limits_are_named as limits_are_named,
    crate::behaviour::an_attempt_runs_once as an_attempt_runs_once,
    crate::behaviour::a_standby_sees_what_came_after_it as a_standby_sees_what_came_after_it,
    crate::behaviour::an_abandoned_standby_leaves_nothing as an_abandoned_standby_leaves_nothing,
    crate::doors::files_go_in_and_come_out as files_go_in_and_come_out,
    crate::doors::what_cannot_be_read_is_named as what_cannot_be_read_is_named,
    crate::doors::everything_has_its_time as everything_has_its_time,
    crate::doors::a_put_may_be_given_up as a_put_may_be_given_up,
    crate::doors::who_takes_slowly_holds_up_nobody as who_takes_slowly_holds_up_nobody,
    crate::doors::an_environment_that_stays_is_empty_and_ends as an_environment_that_stays_is_empty_and_ends,
    crate::doors::programs_beside_end_with_the_commands as programs_beside_end_with_the_commands,
    crate::doors::programs_beside_are_talked_with as programs_beside_are_talked_with,
    crate::ending::what_is_left_behind_is_gone as what_is_left_behind_is_gone,
    crate::ending::cancel_ends_with_grace as cancel_ends_with_grace,
    crate::ending::what_forks_while_it_is_cancelled_hears_of_it as what_forks_while_it_is_cancelled_hears_of_it,
    crate::ending::a_cancel_between_commands_starts_no_other as a_cancel_between_commands_starts_no_other,
    crate::ending::ignoring_term_does_not_help as ignoring_term_does_not_help,
    crate::ending::kill_ends_at_once as kill_ends_at_once,
    crate::ending::a_timeout_counts_and_ends as a_timeout_counts_and_ends,
    crate::ending::a_dropped_execution_is_killed as a_dropped_execution_is_killed,
    crate::ending::a_fork_bomb_ends as a_fork_bomb_ends,
    crate::ending::a_reader_that_stops_does_not_stop_the_ending as a_reader_that_stops_does_not_stop_the_ending,
    crate::ending::nothing_outlives_a_killed_agent as nothing_outlives_a_killed_agent,
    crate::volume::bytes_arrive_as_written as bytes_arrive_as_written,
    crate::volume::a_hundred_megabytes_arrive_whole as a_hundred_megabytes_arrive_whole,
    crate::volume::a_thousand_commands_run as a_thousand_commands_run,
    crate::volume::many_run_side_by_side as many_run_side_by_side,
}

// What depends on the environment's being a machine; the rest is the init's, which is everywhere the same. Each boots one.
executors! {
    microvm;
    crate::machines::a_machine_comes_up as a_machine_comes_up,
    crate::machines::a_machine_is_cancelled_and_timed_out as a_machine_is_cancelled_and_timed_out,
    crate::machines::what_a_machine_has_is_bounded as what_a_machine_has_is_bounded,
    crate::machines::a_dropped_machine_is_gone as a_dropped_machine_is_gone,
    crate::company::machines_have_users as machines_have_users,
    crate::company::a_machine_has_room_for_services as a_machine_has_room_for_services,
    crate::company::services_end_with_their_machine as services_end_with_their_machine,
    crate::company::no_machine_outlives_a_killed_agent as no_machine_outlives_a_killed_agent,
    crate::behaviour::resource_use_is_told as resource_use_is_told,
    crate::containers::services_are_programs_beside_an_action as services_are_programs_beside_an_action,
    crate::behaviour::exit_codes_are_the_shells as exit_codes_are_the_shells,
    crate::behaviour::a_standby_sees_what_came_after_it as a_standby_sees_what_came_after_it,
    crate::behaviour::an_abandoned_standby_leaves_nothing as an_abandoned_standby_leaves_nothing,
    crate::doors::files_go_in_and_come_out as files_go_in_and_come_out,
    crate::volume::bytes_arrive_as_written as bytes_arrive_as_written,
    crate::network::the_outside_is_reached_and_nothing_else as the_outside_is_reached_and_nothing_else,
    crate::network::a_machine_speaks_for_itself_alone as a_machine_speaks_for_itself_alone,
    crate::allowed::a_machine_is_held_to_its_list as a_machine_is_held_to_its_list,
}

// Where machines go on from others. What is in no core of these tests are the many.
executors! {
    microvm_with_templates;
    crate::templates::the_second_of_a_kind_goes_on_from_another as the_second_of_a_kind_goes_on_from_another,
    crate::templates::no_action_fails_by_a_template as no_action_fails_by_a_template,
    crate::templates::a_machine_that_goes_on_has_its_network as a_machine_that_goes_on_has_its_network,
    crate::templates::two_hundred_actions_leave_nothing as two_hundred_actions_leave_nothing,
}

executors! {
    rootless_sealed;
    crate::sealing::nothing_of_the_host_is_seen as nothing_of_the_host_is_seen,
    crate::as_user::nothing_of_the_host_is_changed as nothing_of_the_host_is_changed,
    crate::sealing::there_are_no_privileges as there_are_no_privileges,
    crate::sealing::system_calls_are_filtered as system_calls_are_filtered,
    crate::sealing::namespaces_are_its_own as namespaces_are_its_own,
    crate::sealing::the_network_is_off as the_network_is_off,
    crate::as_user::common_tools_work as common_tools_work,
    crate::sealing::the_workspace_stays_the_agents as the_workspace_stays_the_agents,
    crate::sealing::extra_paths_are_seen_read_only as extra_paths_are_seen_read_only,
    crate::sealing::nothing_is_left as nothing_is_left,
    crate::as_user::processes_are_counted as processes_are_counted,
    crate::sealing::the_init_is_out_of_reach as the_init_is_out_of_reach,
}

executors! {
    sealed;
    crate::sealing::nothing_of_the_host_is_seen as nothing_of_the_host_is_seen,
    crate::sealing::nothing_of_the_host_is_changed as nothing_of_the_host_is_changed,
    crate::sealing::there_are_no_privileges as there_are_no_privileges,
    crate::sealing::system_calls_are_filtered as system_calls_are_filtered,
    crate::sealing::namespaces_are_its_own as namespaces_are_its_own,
    crate::sealing::the_network_is_off as the_network_is_off,
    crate::sealing::common_tools_work as common_tools_work,
    crate::sealing::the_workspace_stays_the_agents as the_workspace_stays_the_agents,
    crate::sealing::extra_paths_are_seen_read_only as extra_paths_are_seen_read_only,
    crate::sealing::nothing_is_left as nothing_is_left,
    crate::sealing::a_failed_start_hurts_nobody as a_failed_start_hurts_nobody,
    crate::sealing::a_fresh_machine_will_do as a_fresh_machine_will_do,
    crate::sealing::the_init_is_out_of_reach as the_init_is_out_of_reach,
}

executors! {
    container_sealed;
    crate::containers::hostile_images_get_nowhere as hostile_images_get_nowhere,
    crate::containers::images_have_users as images_have_users,
    crate::containers::an_image_is_its_layers as an_image_is_its_layers,
    crate::containers::an_image_says_how_it_is_run as an_image_says_how_it_is_run,
    crate::containers::what_is_not_wanted_any_more_is_not_waited_for as what_is_not_wanted_any_more_is_not_waited_for,
    crate::containers::what_is_written_is_measured_and_goes as what_is_written_is_measured_and_goes,
    crate::containers::an_image_that_is_not_to_be_had_is_told as an_image_that_is_not_to_be_had_is_told,
    crate::containers::neighbours_meet_at_localhost as neighbours_meet_at_localhost,
    crate::containers::services_are_programs_beside_an_action as services_are_programs_beside_an_action,
    crate::containers::low_ports_are_everybodys as low_ports_are_everybodys,
    crate::containers::an_entrypoint_is_run_when_asked_for as an_entrypoint_is_run_when_asked_for,
    crate::sealing::nothing_of_the_host_is_seen as nothing_of_the_host_is_seen,
    crate::sealing::nothing_of_the_host_is_changed as nothing_of_the_host_is_changed,
    crate::sealing::there_are_no_privileges as there_are_no_privileges,
    crate::sealing::system_calls_are_filtered as system_calls_are_filtered,
    crate::sealing::namespaces_are_its_own as namespaces_are_its_own,
    crate::sealing::the_network_is_off as the_network_is_off,
    crate::sealing::the_workspace_stays_the_agents as the_workspace_stays_the_agents,
    crate::sealing::nothing_is_left as nothing_is_left,
    crate::sealing::a_fresh_machine_will_do as a_fresh_machine_will_do,
    crate::sealing::the_init_is_out_of_reach as the_init_is_out_of_reach,
}

executors! {
    rootless_container_sealed;
    crate::containers::hostile_images_get_nowhere as hostile_images_get_nowhere,
    crate::containers::images_have_users as images_have_users,
    crate::containers::an_image_is_its_layers as an_image_is_its_layers,
    crate::containers::an_image_says_how_it_is_run as an_image_says_how_it_is_run,
    crate::containers::what_is_not_wanted_any_more_is_not_waited_for as what_is_not_wanted_any_more_is_not_waited_for,
    crate::containers::what_is_written_is_measured_and_goes as what_is_written_is_measured_and_goes,
    crate::containers::an_image_that_is_not_to_be_had_is_told as an_image_that_is_not_to_be_had_is_told,
    crate::containers::neighbours_meet_at_localhost as neighbours_meet_at_localhost,
    crate::containers::services_are_programs_beside_an_action as services_are_programs_beside_an_action,
    crate::containers::low_ports_are_everybodys as low_ports_are_everybodys,
    crate::containers::an_entrypoint_is_run_when_asked_for as an_entrypoint_is_run_when_asked_for,
    crate::sealing::nothing_of_the_host_is_seen as nothing_of_the_host_is_seen,
    crate::sealing::nothing_of_the_host_is_changed as nothing_of_the_host_is_changed,
    crate::sealing::there_are_no_privileges as there_are_no_privileges,
    crate::sealing::system_calls_are_filtered as system_calls_are_filtered,
    crate::sealing::namespaces_are_its_own as namespaces_are_its_own,
    crate::sealing::the_network_is_off as the_network_is_off,
    crate::sealing::the_workspace_stays_the_agents as the_workspace_stays_the_agents,
    crate::sealing::nothing_is_left as nothing_is_left,
    crate::as_user::processes_are_counted as processes_are_counted,
    crate::sealing::the_init_is_out_of_reach as the_init_is_out_of_reach,
}

executors! {
    rootless_limited;
    crate::behaviour::limits_are_named as limits_are_named,
    crate::behaviour::an_abandoned_standby_leaves_nothing as an_abandoned_standby_leaves_nothing,
    crate::ending::a_fork_bomb_ends as a_fork_bomb_ends,
    crate::ending::a_dropped_execution_is_killed as a_dropped_execution_is_killed,
    crate::ending::cancel_ends_with_grace as cancel_ends_with_grace,
    crate::sealing::nothing_is_left as nothing_is_left,
}

executors! {
    container_stored, rootless_container_stored;
    crate::containers::images_come_from_the_store as images_come_from_the_store,
}

executors! {
    docker_own;
    crate::containers::neighbours_meet_at_localhost as neighbours_meet_at_localhost,
    crate::containers::services_are_programs_beside_an_action as services_are_programs_beside_an_action,
    crate::dockers::a_daemon_says_what_it_is as a_daemon_says_what_it_is,
    crate::dockers::it_is_sealed as it_is_sealed,
    crate::dockers::nothing_is_left_with_the_daemon as nothing_is_left_with_the_daemon,
    crate::dockers::a_sweep_takes_what_is_its_own as a_sweep_takes_what_is_its_own,
    crate::dockers::a_killed_agents_containers_go_by_themselves as a_killed_agents_containers_go_by_themselves,
    crate::dockers::images_have_users as images_have_users,
    crate::dockers::an_image_says_how_it_is_run as an_image_says_how_it_is_run,
    crate::dockers::an_image_that_is_not_to_be_had_is_told as an_image_that_is_not_to_be_had_is_told,
    crate::dockers::a_private_registry_opens_with_its_login_only as a_private_registry_opens_with_its_login_only,
    crate::dockers::a_daemon_that_is_not_there_is_told as a_daemon_that_is_not_there_is_told,
    crate::dockers::the_network_is_the_agents_own as the_network_is_the_agents_own,
    crate::dockers::a_daemon_that_dies_takes_nobody_along as a_daemon_that_dies_takes_nobody_along,
    crate::sealing::the_workspace_stays_the_agents as the_workspace_stays_the_agents,
    crate::sealing::nothing_of_the_host_is_changed as nothing_of_the_host_is_changed,
    crate::sealing::nothing_is_left as nothing_is_left,
    crate::sealing::the_init_is_out_of_reach as the_init_is_out_of_reach,
}

executors! {
    docker_as_user;
    crate::dockers::images_have_users as images_have_users,
    crate::behaviour::a_standby_sees_what_came_after_it as a_standby_sees_what_came_after_it,
    crate::behaviour::an_abandoned_standby_leaves_nothing as an_abandoned_standby_leaves_nothing,
}

executors! {
    container_capable;
    crate::containers::a_few_privileges_can_be_given as a_few_privileges_can_be_given,
}

// Where layers are copied: because it is said so, or because the file system allows nothing else.
executors! {
    container_copied, container_unmapped, rootless_container_copied;
    crate::containers::hostile_images_get_nowhere as hostile_images_get_nowhere,
    crate::containers::images_have_users as images_have_users,
    crate::containers::an_image_is_its_layers as an_image_is_its_layers,
    crate::containers::an_image_says_how_it_is_run as an_image_says_how_it_is_run,
    crate::containers::what_is_not_wanted_any_more_is_not_waited_for as what_is_not_wanted_any_more_is_not_waited_for,
    crate::containers::what_is_written_is_measured_and_goes as what_is_written_is_measured_and_goes,
    crate::containers::copying_is_told as copying_is_told,
    crate::sealing::the_workspace_stays_the_agents as the_workspace_stays_the_agents,
    crate::behaviour::a_standby_sees_what_came_after_it as a_standby_sees_what_came_after_it,
    crate::sealing::nothing_of_the_host_is_changed as nothing_of_the_host_is_changed,
    crate::sealing::there_are_no_privileges as there_are_no_privileges,
}

// On a file system whose mounts cannot map owners.
executors! {
    unmapped;
    crate::sealing::the_workspace_stays_the_agents as the_workspace_stays_the_agents,
    crate::behaviour::a_standby_sees_what_came_after_it as a_standby_sees_what_came_after_it,
    crate::sealing::nothing_of_the_host_is_changed as nothing_of_the_host_is_changed,
    crate::sealing::there_are_no_privileges as there_are_no_privileges,
    crate::sealing::common_tools_work as common_tools_work,
}

executors! {
    rootless_pasta, rootless_slirp4netns, rootless_container_pasta, rootless_container_slirp4netns;
    crate::network::the_outside_is_reached_and_nothing_else as the_outside_is_reached_and_nothing_else,
    crate::network::binding_to_an_interface_does_not_help as binding_to_an_interface_does_not_help,
    crate::network::sandboxes_do_not_reach_each_other as sandboxes_do_not_reach_each_other,
    crate::allowed::the_listed_is_reached_and_nothing_else as the_listed_is_reached_and_nothing_else,
    crate::allowed::addresses_are_listed_without_names as addresses_are_listed_without_names,
    crate::allowed::the_record_is_bounded_and_outlives_a_kill as the_record_is_bounded_and_outlives_a_kill,
    crate::allowed::a_gatekeeper_takes_its_environment_along as a_gatekeeper_takes_its_environment_along,
    crate::ending::nothing_outlives_a_killed_agent as nothing_outlives_a_killed_agent,
}

executors! {
    networked, container_networked;
    crate::network::the_outside_is_reached_and_nothing_else as the_outside_is_reached_and_nothing_else,
    crate::network::sandboxes_do_not_reach_each_other as sandboxes_do_not_reach_each_other,
    crate::network::links_go_with_their_sandboxes as links_go_with_their_sandboxes,
    crate::network::a_card_reaches_the_outside_and_nothing_else as a_card_reaches_the_outside_and_nothing_else,
    crate::ending::no_link_outlives_a_killed_agent as no_link_outlives_a_killed_agent,
    crate::ending::no_gatekeeper_outlives_a_killed_agent as no_gatekeeper_outlives_a_killed_agent,
    crate::allowed::the_listed_is_reached_and_nothing_else as the_listed_is_reached_and_nothing_else,
    crate::allowed::addresses_are_listed_without_names as addresses_are_listed_without_names,
    crate::allowed::a_silent_name_server_is_not_waited_for_long as a_silent_name_server_is_not_waited_for_long,
    crate::allowed::the_record_is_bounded_and_outlives_a_kill as the_record_is_bounded_and_outlives_a_kill,
    crate::allowed::a_gatekeeper_takes_its_environment_along as a_gatekeeper_takes_its_environment_along,
    crate::allowed::a_gatekeeper_has_no_privilege_but_one as a_gatekeeper_has_no_privilege_but_one,
}
