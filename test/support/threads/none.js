export const named = () => {}
