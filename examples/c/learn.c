/* Teaches a model what a file says, and asks it before and after. Killed at any moment, the same command goes on from the
 * last checkpoint.
 *
 *     cc learn.c -I../../ios/Sources/CPocketLora libpocketlora.a -lm -lpthread -ldl -o learn
 *     ./learn MODEL DATA.jsonl OUT "Which boat has Mira?" [STEP]
 *
 * DATA has an object a line with `question` and `answer`. With STEP the program ends itself there as a kill would;
 * without, it then goes on. A folder with a finished adapter is refused. What is open when a call fails goes with the program. */
#include "pocketlora.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pl_str text(const char *chars) { return (pl_str){(const uint8_t *)chars, strlen(chars)}; }

static int failed(pl_error *error) {
    pl_str message = pl_error_message(error);
    fprintf(stderr, "error %u: %.*s\n", pl_error_code(error), (int)message.len, message.data);
    pl_error_free(error);
    return 1;
}

/* Asks, with the likeliest tokens. Returns 0 when all went well. */
static uint32_t ask(pl_engine *engine, const char *question, pl_error **error) {
    pl_chat *chat = NULL;
    pl_buffer *answer = NULL;
    pl_chat_options options = {.size = sizeof options};
    uint32_t code = pl_chat_new(engine, &chat, error);
    if (!code) code = pl_chat_options_of(chat, &options, error);
    options.temperature = 0;
    options.max_tokens = 24;
    if (!code) code = pl_chat_set_options(chat, &options, error);
    if (!code) code = pl_chat_send(chat, text(question), NULL, NULL, NULL, &answer, error);
    if (!code) printf("> %s\n< %.*s\n", question, (int)pl_buffer_bytes(answer).len, pl_buffer_bytes(answer).data);
    pl_buffer_free(answer);
    pl_chat_free(chat);
    return code;
}

/* Where the run is to be killed, whether it was paused, and whether it has ended. */
struct run {
    pl_trainer *trainer;
    uint64_t end;
    int paused;
    atomic_int ended;
};

static uint32_t hear(void *user, const pl_train_event *event) {
    struct run *run = user;
    if (event->kind != 1) return PL_RUN;
    printf("step %llu of %llu: loss %.3f\n", (unsigned long long)event->step, (unsigned long long)event->steps, event->loss);
    if (event->step == run->end) fflush(stdout), _Exit(9);
    /* A call comes in, say. */
    return event->step == 3 && !run->paused++ ? PL_PAUSE : PL_RUN;
}

/* Lets the run go on when it is held. */
static void *go_on(void *user) {
    struct run *run = user;
    uint32_t paused = 0;
    pl_error *error = NULL;
    while (!run->ended && !pl_trainer_wait_paused(run->trainer, 0.5, &paused, &error) && !paused) {
    }
    if (paused) printf("paused\n"), pl_trainer_order(run->trainer, PL_RUN, &error);
    pl_error_free(error);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 5 && argc != 6) return fprintf(stderr, "usage: learn MODEL DATA.jsonl OUT QUESTION [STEP]\n"), 2;
    pl_engine *engine = NULL;
    pl_trainer *trainer = NULL;
    pl_error *error = NULL;
    if (pl_engine_open(text(argv[1]), NULL, &engine, &error)) return failed(error);
    if (ask(engine, argv[4], &error)) return failed(error);

    pl_train_options options = {
        .size = sizeof options,
        .start = 2, /* Goes on from a checkpoint, if there is one. */
        .flags = PL_FIXED_SETTINGS,
        .data = text(argv[2]),
        .out = text(argv[3]),
        .settings = text("{\"steps\": 20, \"rank\": 16, \"lr\": 1e-3, \"batch\": 5, \"save-every\": 1, \"keep\": \"off\", \"check\": false}"),
    };
    if (pl_trainer_new(engine, &options, NULL, &trainer, &error)) return failed(error);
    pl_trainer_info info = {.size = sizeof info};
    if (pl_trainer_info_of(trainer, &info, &error)) return failed(error);
    printf("%s after step %llu; %.1f MB\n", info.resumed ? "resumed" : "begins", (unsigned long long)info.step,
           info.planned / 1e6);

    struct run run = {.trainer = trainer, .end = argc == 6 ? strtoull(argv[5], NULL, 10) : 0, .paused = info.step >= 3};
    pl_train_listener listener = {.size = sizeof listener, .user = &run, .on_event = hear};
    pl_train_summary summary = {.size = sizeof summary};
    pthread_t helper;
    int helped = !run.paused && !pthread_create(&helper, NULL, go_on, &run);
    uint32_t code = pl_trainer_run(trainer, &listener, &summary, &error);
    run.ended = 1;
    if (helped) pthread_join(helper, NULL);
    if (code) return failed(error);
    pl_trainer_free(trainer);

    /* What was learned is the user's own: sealed, it is of use to nobody who copies the file. An app has its key in the
     * system's keystore, and writes these bytes to a file. */
    const pl_str key = text("not a secret, for an example has");
    pl_buffer *sealed = NULL;
    if (pl_adapter_seal(engine, text(argv[3]), key, 1, text(""), &sealed, &error)) return failed(error);
    pl_engine_free(engine);

    uint64_t adapter = 0;
    if (pl_engine_open(text(argv[1]), NULL, &engine, &error)) return failed(error);
    if (pl_adapter_attach_sealed(engine, pl_buffer_bytes(sealed), text(argv[3]), key, 1, text(""), 1, &adapter, &error))
        return failed(error);
    pl_buffer_free(sealed);
    if (ask(engine, argv[4], &error)) return failed(error);
    pl_engine_free(engine);
    return 0;
}
