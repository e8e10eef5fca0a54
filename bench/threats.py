"""Every threat of the specification, and the tests that try it, the row that measures it, or why neither does.

A test checks that each test named here exists. Not here: the tests themselves, and how rows are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["THREATS", "Threat"]

FILES = "Models and files"
TEXT = "Text"
PROCESS = "Process, threads, resources"
HTTP = "HTTP"


@dataclass(frozen=True)
class Threat:
    """``tests`` are named as pytest names them, without parameters; ``reason`` is what they leave out, or why none."""

    number: str
    title: str
    fault: str
    tests: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    reason: str = ""


ENGINE = "tests/runtime/test_onnxruntime_engine.py"
HOSTILE = "tests/runtime/test_hostile.py"
TOKENS = "tests/runtime/test_tokenizer.py"
REFERENCE = "tests/runtime/test_tokenizer_reference.py"
EMBEDDER = "tests/runtime/test_embedder.py"
BUNDLE = "tests/runtime/test_bundle.py"
SOURCES = "tests/models/test_sources.py"
CACHE = "tests/models/test_cache.py"
HOME = "tests/runtime/test_home.py"
FORK = "tests/runtime/test_fork.py"
SCHEDULER = "tests/runtime/test_scheduler.py"
ASYNC = "tests/runtime/test_async_embedder.py"
CPU = "tests/runtime/test_cpu.py"
SERVERLESS = "tests/runtime/test_serverless.py"
WIRE = "tests/runtime/test_wire.py"
SERVER = "tests/runtime/serve/test_process.py"
CLIENTS = "tests/runtime/serve/test_bad_clients.py"
PROTOCOL = "tests/runtime/serve/test_protocol.py"
THREADS = "tests/runtime/test_threads.py"
OPENAPI = "tests/runtime/serve/test_openapi.py"
ROUTES = "tests/runtime/serve/test_routes.py"
SANDBOX = "tests/bench/test_sandbox.py"

THREATS = (
    Threat(
        "A1",
        FILES,
        "truncated graph",
        (
            f"{ENGINE}::TestFiles::test_a_truncated_graph_is_refused_by_its_hash",
            f"{ENGINE}::TestFiles::test_truncated_graphs_with_a_true_hash_are_refused",
            "tests/quantize/test_edge.py::test_a_damaged_edge_file_is_refused_by_its_hash",
            f"{HOSTILE}::test_damaged_files_are_refused_by_their_hash_and_crash_nothing_without_it",
        ),
        (1,),
    ),
    Threat(
        "A2",
        FILES,
        "flipped bits",
        (
            f"{ENGINE}::TestFiles::test_fifty_flipped_bits_are_each_refused_by_the_hash",
            f"{HOSTILE}::test_damaged_files_are_refused_by_their_hash_and_crash_nothing_without_it",
        ),
        (1,),
    ),
    Threat(
        "A3",
        FILES,
        "hostile bytes: HTML, pointers, pipes, devices, folders, files without end",
        (
            f"{ENGINE}::TestFiles::test_what_is_no_graph_is_refused_even_with_a_true_hash",
            f"{ENGINE}::TestFiles::test_what_is_not_a_file_is_refused_at_once",
            f"{ENGINE}::TestFiles::test_a_pipe_put_in_the_place_of_the_graph_does_not_hang",
            f"{HOSTILE}::test_files_without_end_are_refused_unread",
            f"{HOSTILE}::test_any_damage_to_a_folder_is_one_of_our_errors",
        ),
    ),
    Threat(
        "A4",
        FILES,
        "another model than the manifest says",
        (
            f"{ENGINE}::TestGraph::test_a_graph_other_than_the_manifest_says_is_refused_at_load",
            f"{ENGINE}::TestGraph::test_a_graph_that_onnxruntime_refuses_is_a_graph_error",
        ),
    ),
    Threat(
        "A5",
        FILES,
        "external data",
        (
            f"{ENGINE}::TestGraph::test_external_data_is_refused_wherever_it_hides",
            f"{ENGINE}::TestGraph::test_the_way_to_every_tensor_is_that_of_the_onnx_format",
            "tests/quantize/test_edge.py::test_external_data_is_not_converted",
        ),
        (2,),
        "all of it is refused, wherever it points, so links and sizes are never looked at",
    ),
    Threat(
        "A6",
        FILES,
        "the .ort file: a second parser, and a mapped file that shrinks",
        (
            "tests/quantize/test_edge.py::test_garbage_with_a_true_hash_is_a_graph_error",
            "tests/quantize/test_edge.py::test_one_that_is_replaced_by_renaming_later_does_no_harm",
            f"{HOSTILE}::test_damaged_files_are_refused_by_their_hash_and_crash_nothing_without_it",
        ),
        (1,),
        "truncating a file that a process has mapped ends the process (SIGBUS), as with any mapped file: documented in "
        "`qingyu.runtime.onnxruntime_engine`, replace by renaming",
    ),
    Threat(
        "A7",
        FILES,
        "pickles",
        (
            f"{HOSTILE}::test_pickles_and_code_beside_a_model_are_never_opened",
            "tests/models/test_weights.py::test_a_pickle_is_refused_unopened_with_the_way_out",
            f"{SOURCES}::test_a_repository_of_pickles_is_refused",
        ),
        (2,),
    ),
    Threat(
        "A8",
        FILES,
        "archives with paths, links, bombs",
        (
            f"{BUNDLE}::test_an_archive_of_another_form_is_refused_and_nothing_written",
            f"{BUNDLE}::test_entries_that_share_bytes_are_refused",
            f"{BUNDLE}::test_sizes_that_promise_more_than_there_is_are_refused",
            "tests/runtime/test_app_bundle.py::test_a_wheel_with_a_path_that_leads_out_of_it_is_refused",
        ),
        (2,),
        "tar archives are not read at all",
    ),
    Threat(
        "A9",
        FILES,
        "a hostile tokenizer.json",
        (
            f"{TOKENS}::test_a_hostile_file_is_a_tokenizer_error_when_it_is_opened",
            f"{TOKENS}::test_a_panic_at_a_later_text_is_a_tokenizer_error",
            f"{TOKENS}::test_interruptions_are_not_taken_for_panics",
            f"{TOKENS}::test_files_that_are_absent_too_large_or_no_files_are_not_read",
            f"{HOSTILE}::test_mutated_tokenizers_are_refused_or_read_and_no_panic_gets_out",
        ),
        (2,),
    ),
    Threat(
        "A10",
        FILES,
        "absurd or contradictory settings",
        (
            f"{HOSTILE}::test_any_change_to_a_manifest_gives_a_spec_or_a_manifest_error",
            f"{HOSTILE}::test_any_text_as_a_manifest_is_a_manifest_error",
            "tests/models/test_checkpoint.py::test_an_absurd_number_is_one_error_naming_the_field",
            "tests/quantize/test_edge.py::test_a_hostile_manifest_is_refused",
        ),
    ),
    Threat(
        "A11",
        FILES,
        "wrong bytes while downloading",
        (
            f"{SOURCES}::test_a_flipped_bit_is_an_error_and_leaves_nothing",
            f"{SOURCES}::test_a_wrong_length_is_an_error",
            f"{SOURCES}::test_a_server_that_cannot_go_on_begins_again",
            f"{SOURCES}::test_a_redirect_leads_to_http_or_nowhere",
            f"{SOURCES}::test_a_server_that_goes_on_failing_is_an_error_after_three_attempts",
        ),
    ),
    Threat(
        "A12",
        FILES,
        "a download that is killed",
        (
            f"{CACHE}::test_killed_in_the_middle_and_started_again_it_goes_on_from_there",
            f"{SOURCES}::test_a_connection_cut_at_twenty_offsets_is_taken_up_each_time",
            "tests/cli/test_pull.py::test_killed_while_it_makes_the_model_it_succeeds_the_next_time",
        ),
        (4,),
    ),
    Threat(
        "A13",
        FILES,
        "processes that download at once",
        (
            f"{CACHE}::test_eight_processes_at_once_give_one_good_copy",
            "tests/cli/test_pull.py::test_eight_pulls_at_once_all_succeed_and_one_makes_the_model",
        ),
        (5,),
        "locks that do nothing are imitated in Python, not with LD_PRELOAD",
    ),
    Threat(
        "A14",
        FILES,
        "a full disk",
        (
            f"{SOURCES}::test_a_full_disk_is_said_and_leaves_nothing",
            f"{SOURCES}::test_a_disk_that_refuses_in_the_middle_is_said_and_leaves_nothing",
            "tests/quantize/test_pipeline.py::test_a_full_disk_is_said_and_leaves_nothing",
            "tests/quantize/test_edge.py::test_a_full_disk_is_an_output_error",
        ),
        (6,),
    ),
    Threat(
        "A15",
        FILES,
        "a read-only root with /tmp only",
        (
            f"{SANDBOX}::test_a_function_runs_read_only_without_home_shm_and_network",
            f"{BUNDLE}::test_where_the_home_cannot_be_written_a_temporary_folder_serves",
            f"{CACHE}::test_a_home_that_cannot_be_written_is_one_typed_error",
        ),
        (6, 23),
    ),
    Threat(
        "A16",
        FILES,
        "a cache folder that others can write",
        (
            f"{HOME}::test_a_folder_that_everybody_may_write_to_is_refused",
            f"{HOME}::test_a_folder_of_somebody_else_is_refused",
            f"{HOME}::test_a_link_of_somebody_else_is_refused_and_one_of_our_own_followed",
            f"{HOME}::test_what_is_made_is_for_this_user_alone_whatever_the_umask",
            f"{CACHE}::test_a_symbolic_link_in_place_of_a_file_is_replaced_and_its_target_left",
        ),
    ),
    Threat(
        "A17",
        FILES,
        "a quantizer that is stopped",
        (
            "tests/quantize/test_pipeline.py::test_killed_half_way_no_output_stands_under_its_name",
            "tests/quantize/test_pipeline.py::test_output_onto_the_input_is_refused",
            "tests/quantize/test_pipeline.py::test_overwriting_keeps_the_old_model_when_the_new_one_is_refused",
        ),
    ),
    Threat(
        "A18",
        FILES,
        "silent telemetry",
        (
            f"{ENGINE}::TestTelemetry::test_no_socket_is_opened",
            f"{ENGINE}::TestTelemetry::test_a_run_leaves_nothing_under_home",
            f"{ENGINE}::TestTelemetry::test_an_earlier_import_with_telemetry_is_warned_of_once",
        ),
        (3,),
    ),
    Threat(
        "B1",
        TEXT,
        "lone surrogates, invalid UTF-8",
        (
            f"{TOKENS}::test_lone_surrogates_are_refused_by_index_and_position_wherever_they_are",
            f"{SERVERLESS}::test_a_mistake_has_its_status_and_says_what_was_expected",
            f"{WIRE}::test_any_bytes_are_an_object_or_400",
        ),
    ),
    Threat(
        "B2",
        TEXT,
        "NUL, controls, marks without width, private use",
        (
            f"{REFERENCE}::test_case_width_blanks_specials_and_controls_have_the_ids_of_the_reference",
            f"{EMBEDDER}::test_nul_and_empty_texts_have_vectors",
        ),
    ),
    Threat(
        "B3",
        TEXT,
        "empty texts, None, numbers, lists in lists",
        (
            f"{EMBEDDER}::test_nul_and_empty_texts_have_vectors",
            f"{EMBEDDER}::test_what_is_not_text_is_refused_by_its_place",
            f"{TOKENS}::test_no_texts_give_an_empty_list_and_an_empty_text_gives_the_special_tokens",
        ),
    ),
    Threat(
        "B4",
        TEXT,
        "a text of 10 MB",
        (
            "tests/runtime/test_windows.py::test_ten_megabytes_of_chinese_take_50_ms_and_32_megabytes_at_most",
            "tests/runtime/test_windows.py::test_ten_megabytes_of_anything_take_32_megabytes_at_most",
            "tests/runtime/test_windows.py::test_windows_give_the_ids_of_full_tokenization_then_truncation",
        ),
        (8,),
    ),
    Threat(
        "B5",
        TEXT,
        "a million texts",
        (
            f"{EMBEDDER}::test_a_stream_of_any_length_takes_constant_memory",
            f"{EMBEDDER}::test_an_error_in_the_callers_generator_comes_back_as_it_is",
            "tests/runtime/test_batching.py::test_closing_the_iterator_early_drops_what_has_not_begun",
        ),
        (9,),
    ),
    Threat(
        "B6",
        TEXT,
        "rare Han characters",
        (
            f"{REFERENCE}::test_every_han_character_alone_and_between_letters_has_the_ids_of_the_reference",
            f"{REFERENCE}::test_the_differences_from_berts_own_code_are_a_typo_in_a_range_and_nfc",
        ),
        (7,),
    ),
    Threat(
        "B7",
        TEXT,
        "traditional and simplified, widths, emoji",
        (
            f"{REFERENCE}::test_case_width_blanks_specials_and_controls_have_the_ids_of_the_reference",
            f"{REFERENCE}::test_real_texts_have_the_ids_of_the_reference",
            f"{REFERENCE}::test_random_strings_over_all_planes_have_the_ids_of_the_reference",
        ),
        (7,),
    ),
    Threat(
        "B8",
        TEXT,
        "special tokens that somebody typed",
        (
            f"{TOKENS}::test_a_typed_mask_is_the_special_token_or_plain_text",
            "tests/runtime/test_reference.py::test_a_typed_mask_stays_the_special_token_under_lower_casing",
        ),
    ),
    Threat(
        "B9",
        TEXT,
        "fuzzed text",
        (
            f"{REFERENCE}::test_random_strings_over_all_planes_have_the_ids_of_the_reference",
            "tests/runtime/test_windows.py::test_windows_of_the_bge_tokenizer_change_no_id",
        ),
        (7,),
        "random strings with a fixed seed instead of a fuzzer that follows coverage: the code under test is Rust",
    ),
    Threat(
        "C1",
        PROCESS,
        "import, then fork; gunicorn --preload",
        (
            f"{FORK}::test_a_child_leaves_after_the_parent_only_imported",
            "tests/bench/test_reliability.py::test_gunicorn_with_a_loaded_model_answers_reloads_and_ends",
        ),
        (13,),
    ),
    Threat(
        "C2",
        PROCESS,
        "session, then fork",
        (
            f"{FORK}::test_a_child_runs_on_a_session_of_its_own_and_leaves",
            f"{FORK}::test_a_child_never_destroys_the_session_it_inherited",
        ),
        (13,),
    ),
    Threat(
        "C3",
        PROCESS,
        "fork while another thread runs",
        (
            f"{FORK}::test_a_fork_while_other_threads_run_neither_hangs_nor_crashes",
            f"{FORK}::test_a_fork_in_the_middle_of_a_run_leaves_the_child_free",
        ),
        (13,),
    ),
    Threat(
        "C4",
        PROCESS,
        "spawn, pickle",
        (
            f"{FORK}::test_multiprocessing_gives_the_same_vectors_by_every_start_method",
            f"{EMBEDDER}::test_a_pickled_embedder_opens_the_same_model",
        ),
    ),
    Threat(
        "C5",
        PROCESS,
        "threads",
        (
            f"{EMBEDDER}::test_sixteen_threads_get_what_one_gets",
            f"{ENGINE}::TestRun::test_many_threads_give_the_very_bits_of_one",
        ),
        (14,),
    ),
    Threat(
        "C6",
        PROCESS,
        "cancelled tasks",
        (
            f"{SCHEDULER}::test_half_of_a_thousand_calls_cancelled_before_they_start_are_never_run",
            f"{SCHEDULER}::test_a_call_cancelled_while_it_runs_leaves_its_company_unharmed",
            f"{ASYNC}::test_half_of_a_thousand_cancelled_calls_are_not_computed_and_the_rest_is_right",
        ),
        (15,),
    ),
    Threat(
        "C7",
        PROCESS,
        "fork and the tokenizer's own threads",
        (f"{TOKENS}::test_forked_children_encode_without_a_hang_or_a_word",),
    ),
    Threat(
        "C8",
        PROCESS,
        "SIGTERM with requests in flight",
        (
            f"{SERVER}::test_fifty_requests_under_way_are_answered_after_sigterm_and_new_ones_refused",
            f"{SERVER}::test_a_second_signal_and_the_end_of_the_grace_force_the_end",
        ),
        (16,),
    ),
    Threat(
        "C9",
        PROCESS,
        "SIGKILL and restart",
        (f"{SERVER}::test_a_unix_socket_is_for_this_user_and_one_that_was_left_is_replaced",),
        (4,),
    ),
    Threat(
        "C10",
        PROCESS,
        "too little memory",
        (
            f"{ENGINE}::TestMemory::test_a_real_shortage_is_typed_and_leaves_the_engine_usable",
            f"{HOSTILE}::test_too_little_memory_for_the_graph_is_one_of_our_errors_and_the_process_goes_on",
            "tests/runtime/test_memory.py::test_a_budget_too_small_is_refused_with_the_figure_that_is_missing",
        ),
        (),
        "where memory runs out while tokenizer.json is read, the Rust library ends the process",
    ),
    Threat(
        "C11",
        PROCESS,
        "memory as planned",
        (
            "tests/runtime/test_memory.py::test_a_run_of_the_usual_size_takes_no_more_than_the_formula",
            "tests/runtime/test_memory.py::test_a_process_stays_within_its_memory_budget",
        ),
        (21,),
    ),
    Threat(
        "C12",
        PROCESS,
        "memory kept after a large batch",
        (f"{ENGINE}::TestMemory::test_the_memory_of_one_large_batch_is_given_back",),
        (21,),
    ),
    Threat(
        "C13",
        PROCESS,
        "CPU quotas",
        (
            f"{CPU}::test_a_v1_quota_is_rounded_up_and_capped_by_affinity",
            f"{CPU}::test_a_v2_quota_is_rounded_up_and_capped_by_affinity",
            f"{CPU}::test_a_real_v1_quota_decides_the_threads",
        ),
        (20,),
        "cgroup v2 with imitated files only: this kernel gives no v2 controllers",
    ),
    Threat(
        "C14",
        PROCESS,
        "no CPU count, no /proc, no /sys",
        (
            f"{CPU}::test_a_machine_without_proc_and_sys_works",
            f"{SANDBOX}::test_a_function_runs_read_only_without_home_shm_and_network",
        ),
    ),
    Threat(
        "C15",
        PROCESS,
        "too few open files or threads",
        (
            f"{HOSTILE}::test_no_more_open_files_are_one_of_our_errors",
            f"{THREADS}::test_the_limit_of_the_system_is_the_same_error",
            f"{THREADS}::test_asynchronous_calls_are_each_told_and_none_waits_for_ever",
            f"{SERVER}::test_without_threads_requests_are_503_and_the_process_goes_on",
        ),
    ),
    Threat(
        "C16",
        PROCESS,
        "a clock that jumps",
        (
            f"{HOSTILE}::test_nothing_in_the_runtime_reads_the_clock_on_the_wall",
            f"{SERVER}::test_a_clock_that_is_set_by_hours_ends_no_wait",
        ),
        (),
        "jumps are imitated in Python: the system's own clock was not set",
    ),
    Threat(
        "C17",
        PROCESS,
        "a CPU that computes wrongly",
        (
            "tests/runtime/test_selfcheck.py::TestFail::test_wrong_kernels_are_caught_before_the_first_vector",
            "tests/runtime/test_selftest.py::test_one_wrong_value_in_any_case_is_found",
        ),
        (11, 12),
    ),
    Threat(
        "C18",
        PROCESS,
        "NaN and infinity",
        (
            f"{ENGINE}::TestRun::test_a_value_that_is_not_finite_is_refused",
            "tests/models/test_weights.py::test_a_weight_that_is_not_finite_is_refused_and_nothing_is_left",
            f"{SERVER}::test_numbers_that_are_none_are_500_and_never_json",
        ),
    ),
    Threat(
        "C19",
        PROCESS,
        "a model replaced under load",
        (
            f"{SERVER}::test_a_model_is_replaced_under_load_without_a_failed_or_mixed_answer",
            f"{HOSTILE}::test_models_that_are_replaced_again_and_again_leave_their_memory",
        ),
        (19,),
    ),
    Threat(
        "C20",
        PROCESS,
        "close while others run",
        (
            f"{ENGINE}::TestLife::test_close_while_many_run_ends_each_run_well_or_closed",
            f"{ENGINE}::TestLife::test_close_waits_for_the_runs_under_way",
            f"{EMBEDDER}::test_after_close_calls_are_refused",
        ),
    ),
    Threat(
        "C21",
        PROCESS,
        "leaks",
        (
            f"{HOSTILE}::test_opening_and_closing_many_times_leaves_little_behind",
            f"{ENGINE}::TestLife::test_close_frees_the_session_even_after_a_kept_error",
        ),
    ),
    Threat(
        "D1",
        HTTP,
        "ten times the load",
        (f"{SERVER}::test_what_would_wait_too_long_is_refused_fast_and_the_process_stays_live",),
        (17,),
    ),
    Threat(
        "D2",
        HTTP,
        "a queue bounded in time",
        (
            f"{SCHEDULER}::test_a_call_is_refused_when_what_waits_would_take_longer_than_it_may",
            f"{SERVER}::test_what_would_wait_too_long_is_refused_fast_and_the_process_stays_live",
        ),
        (17,),
    ),
    Threat(
        "D3",
        HTTP,
        "exact shedding",
        (
            f"{SCHEDULER}::test_one_slot_and_a_queue_of_eight_refuse_exactly_two_of_ten",
            f"{SERVER}::test_one_slow_request_and_a_queue_of_eight_refuse_exactly_two_of_ten",
        ),
    ),
    Threat(
        "D4",
        HTTP,
        "clients that send or read slowly",
        (
            f"{CLIENTS}::test_slow_senders_hold_nobody_up_and_are_closed",
            f"{CLIENTS}::test_a_client_that_never_reads_is_closed",
            f"{PROTOCOL}::test_a_client_that_does_not_read_is_given_little_and_then_everything_in_order",
            f"{PROTOCOL}::test_a_client_that_reads_slowly_is_kept_and_one_that_does_not_is_not",
            f"{CLIENTS}::test_what_does_not_arrive_in_time_is_408_and_closed",
        ),
        (18,),
    ),
    Threat(
        "D5",
        HTTP,
        "bodies that are too large or compressed",
        (
            f"{CLIENTS}::test_a_body_over_the_limit_is_refused_before_it_is_sent",
            f"{CLIENTS}::test_an_endless_chunked_body_is_cut_off_while_it_is_sent",
            f"{CLIENTS}::test_only_plain_json_is_taken",
            f"{SERVERLESS}::test_wsgi_reads_no_more_than_the_limit_and_sends_no_body_to_head",
            f"{SERVERLESS}::test_a_compressed_body_is_refused",
        ),
        (18,),
    ),
    Threat(
        "D6",
        HTTP,
        "bad JSON",
        (
            f"{WIRE}::test_what_is_not_one_strict_json_object_is_400",
            f"{WIRE}::test_any_object_is_a_request_or_a_refusal",
            f"{CLIENTS}::test_a_bad_body_is_400_or_422_with_a_body_that_says_so",
        ),
    ),
    Threat(
        "D7",
        HTTP,
        "limits",
        (
            f"{CLIENTS}::test_none_the_limit_and_one_more",
            f"{OPENAPI}::test_a_body_is_read_exactly_if_its_schema_allows_it",
            f"{OPENAPI}::test_the_table_of_statuses_in_the_documentation_is_that_of_the_code",
            f"{SERVERLESS}::test_a_mistake_has_its_status_and_says_what_was_expected",
        ),
    ),
    Threat(
        "D8",
        HTTP,
        "fuzzed requests",
        (
            f"{OPENAPI}::test_schemathesis_finds_nothing",
            f"{CLIENTS}::test_what_is_not_http_is_400_and_closed",
            f"{WIRE}::test_any_bytes_are_an_object_or_400",
        ),
    ),
    Threat(
        "D9",
        HTTP,
        "kept connections that end as a request comes",
        (
            f"{PROTOCOL}::test_a_request_that_has_come_when_the_connection_is_to_end_is_answered",
            f"{PROTOCOL}::test_a_request_that_comes_too_late_finds_an_end_and_no_reset",
            f"{PROTOCOL}::test_an_idle_connection_is_ended",
        ),
        (),
        "a request that is under way in the network when the connection ends is not answered, as HTTP/1.1 has it: its "
        "client finds an end without an answer; connections are kept for 75 s, longer than the usual 60 s of load "
        "balancers",
    ),
    Threat(
        "D10",
        HTTP,
        "clients that leave",
        (f"{SERVER}::test_a_client_that_leaves_is_not_computed_for",),
        (15,),
    ),
    Threat(
        "D11",
        HTTP,
        "health and readiness",
        (
            f"{SERVER}::test_live_at_once_ready_when_the_models_are",
            f"{SERVER}::test_what_would_wait_too_long_is_refused_fast_and_the_process_stays_live",
        ),
    ),
    Threat(
        "D12",
        HTTP,
        "smuggling, headers",
        (
            f"{CLIENTS}::test_what_is_not_http_is_400_and_closed",
            f"{CLIENTS}::test_headers_of_64_kilobytes_are_431_and_closed",
            f"{CLIENTS}::test_requests_behind_each_other_are_answered_in_order",
            f"{PROTOCOL}::test_while_one_is_answered_one_request_waits_and_the_rest_is_not_parsed",
            f"{PROTOCOL}::test_bodies_are_whole_however_they_are_cut",
        ),
        (18,),
    ),
    Threat(
        "D13",
        HTTP,
        "texts and secrets in logs",
        (
            f"{ROUTES}::test_the_log_has_a_line_for_each_request_and_no_text",
            f"{ROUTES}::test_a_request_id_comes_back_only_if_it_is_plain",
        ),
    ),
    Threat(
        "D14",
        HTTP,
        "exposure",
        (
            f"{SERVER}::test_keys_are_asked_for_but_for_health_page_and_openapi",
            f"{SERVER}::test_a_unix_socket_is_for_this_user_and_one_that_was_left_is_replaced",
            f"{SERVERLESS}::test_with_a_key_only_its_bearer_is_answered_and_health_is_free",
        ),
    ),
    Threat(
        "D15",
        HTTP,
        "draining with idle connections",
        (f"{SERVER}::test_idle_connections_do_not_hold_the_end_up",),
        (16,),
    ),
)
