// The emulated kernel of refine in eval mode against float64: see program.h.

#include "program.h"
#include "refine_eval_test.h"

int main(int argc, char** argv) {
  return Program<EvalTest>::main(argc, argv);
}
