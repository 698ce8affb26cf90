/* Opens, answers, trains two steps, swaps adapters and frees, again and again: what the process holds does not grow. */
#include "pocketlora.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pl_str text(const char *chars) { return (pl_str){(const uint8_t *)chars, strlen(chars)}; }

static void must(uint32_t code, pl_error *error) {
    if (!code) return;
    fprintf(stderr, "error %u: %.*s\n", code, (int)pl_error_message(error).len, pl_error_message(error).data);
    exit(1);
}
#define OK(call) must(call, error)

/* Returns the anonymous bytes before it lets go of the model. */
static uint64_t work(const char *model, const char *out) {
    pl_error *error = NULL;
    pl_engine *engine = NULL;
    pl_chat *chat = NULL;
    pl_trainer *trainer = NULL;
    pl_buffer *answer = NULL, *state = NULL;
    uint64_t early = 0, final = 0;
    pl_engine_options options = {.size = sizeof options, .threads = 1};
    OK(pl_engine_open(text(model), &options, &engine, &error));
    OK(pl_chat_new(engine, &chat, &error));
    pl_chat_options short_ones = {.size = sizeof short_ones};
    OK(pl_chat_options_of(chat, &short_ones, &error));
    short_ones.max_tokens = 8;
    OK(pl_chat_set_options(chat, &short_ones, &error));
    OK(pl_chat_send(chat, text("hello"), NULL, NULL, NULL, &answer, &error));
    pl_train_options lesson = {
        .size = sizeof lesson,
        .start = 1,
        .flags = PL_FIXED_SETTINGS,
        .lines = text("{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"c\", \"completion\": \"d\"}\n"),
        .out = text(out),
        .settings = text("{\"steps\": 2, \"rank\": 4, \"batch\": 1, \"keep\": \"off\", \"check\": false}"),
    };
    OK(pl_trainer_new(engine, &lesson, NULL, &trainer, &error));
    OK(pl_trainer_step(trainer, NULL, &error));
    OK(pl_trainer_attach(trainer, 1, &early, &error));
    OK(pl_trainer_run(trainer, NULL, NULL, &error));
    OK(pl_adapter_attach(engine, text(out), 1, &final, &error));
    OK(pl_adapters_scale(engine, (uint64_t[]){early, final}, (float[]){0.5f, 0.5f}, 2, &error));
    OK(pl_adapter_detach(engine, early, &error));
    OK(pl_chat_send(chat, text("again"), NULL, NULL, NULL, NULL, &error));
    OK(pl_chat_save(chat, &state, &error));
    OK(pl_chat_restore(chat, pl_buffer_bytes(state), &error));
    pl_engine_info info = {.size = sizeof info};
    OK(pl_engine_info_of(engine, &info, &error));
    pl_buffer_free(answer), pl_buffer_free(state), pl_trainer_free(trainer), pl_chat_free(chat), pl_engine_free(engine);
    return info.anonymous;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    long rounds = strtol(argv[3], NULL, 10);
    uint64_t early = 0, last = 0;
    for (long i = 0; i < rounds; i++) {
        last = work(argv[1], argv[2]);
        /* What an allocator keeps settles in the first rounds. */
        if (i < rounds / 5 && last > early) early = last;
    }
    printf("%ld rounds: %.2f MB after a fifth, %.2f MB at the end\n", rounds, early / 1e6, last / 1e6);
    return last > early + 1000000;
}
